"""Between a Hugging Face `config.json` and our configs.

Every field is read, known to be irrelevant, or refused by name: a field that is skipped in silence
is how a model comes out subtly wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.checkpoints import files, schema
from mllm_jax.checkpoints.schema import Unknown
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.projector import ProjectorConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
HF_ACTIVATIONS = {ours: hf for hf, ours in ACTIVATIONS.items()}
ACTIVATION = schema.only(*sorted(ACTIVATIONS))
_SELECT = {"default": "patch", "full": "full"}
_MOST_TILES = 16  # along a side of a picture
PINPOINTS = schema.optional(schema.many(schema.many(schema.whole(1, 2**16), 2, 2), 1, 256))

TOKEN_IDS = dict.fromkeys(
    ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"), (schema.IDS, None)
)
# The fields we read, with the value HF gives to a field that is not there.
_LLAVA = TOKEN_IDS | {
    "model_type": (schema.only("llava"), "llava"),
    "image_token_index": (schema.ID, 32000),
    "projector_hidden_act": (ACTIVATION, "gelu"),
    "vision_feature_layer": (schema.whole(-1024, 1024), -2),
    "vision_feature_select_strategy": (schema.only(*_SELECT), "default"),
    "multimodal_projector_bias": (schema.FLAG, True),
    "tie_word_embeddings": (schema.FLAG, False),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
    # Ours: transformers has no such fields, and no such models.
    "projector_fold": (schema.whole(1, 64), 1),
    "projector_depth": (schema.whole(1, 16), 2),
}
_LLAVA_NEXT = _LLAVA | {
    "model_type": (schema.only("llava_next"), "llava_next"),
    "vision_feature_select_strategy": (schema.only("default"), "default"),
    "use_image_newline_parameter": (schema.only(True), True),
    "image_grid_pinpoints": (PINPOINTS, None),
}
TOWER = {  # of any vision transformer
    "hidden_size": (schema.WIDTH, 768),
    "intermediate_size": (schema.WIDTH, 3072),
    "num_hidden_layers": (schema.LAYERS, 12),
    "num_attention_heads": (schema.HEADS, 12),
    "num_channels": (schema.only(3), 3),
    "image_size": (schema.SIDE, 224),
    "patch_size": (schema.SIDE, 32),
    "hidden_act": (ACTIVATION, "quick_gelu"),
    "layer_norm_eps": (schema.EPSILON, 1e-5),
}
_CLIP = TOWER | {"model_type": (schema.only("clip_vision_model"), "clip_vision_model")}
_LLAVA_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}  # what LlavaConfig uses when there is no vision_config at all
_THETA = schema.optional(schema.real(1, 1e11))
_ROPE = {
    "rope_theta": (_THETA, None),
    "rope_type": (schema.only("default"), "default"),
    "type": (schema.only("default"), "default"),
}
_LLAMA = TOKEN_IDS | {
    "model_type": (schema.only("llama", "mistral"), "llama"),
    "vocab_size": (schema.WORDS, 32000),
    "hidden_size": (schema.WIDTH, 4096),
    "intermediate_size": (schema.WIDTH, 11008),
    "num_hidden_layers": (schema.LAYERS, 32),
    "num_attention_heads": (schema.HEADS, 32),
    "num_key_value_heads": (schema.optional(schema.HEADS), None),
    "head_dim": (schema.optional(schema.whole(2, 2**14)), None),
    "hidden_act": (schema.only("silu", "swish"), "silu"),
    "attention_bias": (schema.only(False), False),
    "mlp_bias": (schema.only(False), False),
    "max_position_embeddings": (schema.PLACES, 2048),
    "rms_norm_eps": (schema.EPSILON, 1e-6),
    "rope_theta": (_THETA, None),
    "rope_parameters": (schema.PART, None),
    "rope_scaling": (schema.PART, None),
    "sliding_window": (schema.only(None), None),
    "tie_word_embeddings": (schema.FLAG, False),
}
_MISTRAL = {name: _LLAMA[name] for name in _LLAMA if name not in ("attention_bias", "mlp_bias")} | {
    "intermediate_size": (schema.WIDTH, 14336),
    "num_key_value_heads": (schema.optional(schema.HEADS), 8),
    "sliding_window": (schema.optional(schema.PLACES), 4096),
    "max_position_embeddings": (schema.PLACES, 131072),
}

# The fields that do not change what a trained model computes here.
IGNORED = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map dropout
    dtype ignore_index image_seq_length initializer_factor initializer_range max_position_embeddings
    max_sequence_length name_or_path pretraining_tp projection_dim torch_dtype transformers_version
    use_cache use_image_newline_parameter

    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id

    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript typical_p use_bfloat16
    """.split()  # noqa: SIM905 (70 quoted words would be no easier to read)
)
# LLaVA and CLIP carry a stray vocabulary size; a vision tower ties nothing.
_LLAVA_IGNORED = IGNORED | {"vocab_size"}
_CLIP_IGNORED = IGNORED | {"vocab_size", "tie_word_embeddings"}


class Refused(ValueError):
    """A `config.json` that we do not read.

    Attributes:
        config: the model without the fields we do not know, so that its tensors can be looked at
            as well; None where other things are wrong.
    """

    def __init__(self, source: object, problems: list[str], config: LlavaConfig | None = None):
        super().__init__(files.refusal(source, problems))
        self.config = config


def settle(config: Callable[[], LlavaConfig], source: object, problems: list[str]) -> LlavaConfig:
    """The config, if nothing is wrong with it.

    Raises:
        Refused: there are problems.
    """
    if not all(isinstance(problem, Unknown) for problem in problems):
        raise Refused(source, problems)
    if problems:
        raise Refused(source, problems, config())
    return config()


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> LlavaConfig:
    """Reads the config of a LLaVA or LLaVA-NeXT checkpoint.

    Args:
        fields: the content of `config.json`. Both `rope_theta` and `rope_parameters` are read.
        source: what to call the file in an error.

    Returns:
        The same model in our terms.

    Raises:
        Refused: fields we do not know, or values we do not support, all in one line.
    """
    if "mm_vision_tower" in fields:
        problem = (
            "a config of the original LLaVA code; give it the config.json of its "
            "transformers conversion (llava-hf/...), the tensors are read as they are"
        )
        raise ValueError(files.refusal(source, [problem]))
    problems: list[str] = []
    fields = renamed(fields)
    tiled = fields.get("model_type") == "llava_next"
    llava = schema.read(fields, _LLAVA_NEXT if tiled else _LLAVA, _LLAVA_IGNORED, "", problems)
    defaults = {} if llava["vision_config"] else _LLAVA_CLIP
    clip = read_clip(defaults | (llava["vision_config"] or {}), problems)
    llama = read_llama(llava["text_config"] or {}, problems)
    _check_feature_layer(llava, clip, problems)
    grid = "vision_config.image_size / patch_size", clip["image_size"] // clip["patch_size"]
    schema.divides(("projector_fold", llava["projector_fold"]), grid, problems)
    tiling = _pinpoints(llava, clip, problems) if tiled else None
    return settle(lambda: _config(llava, clip, llama, tiling), source, problems)


def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with the name that newer versions of transformers give to the image token."""
    fields = dict(fields)
    if "image_token_id" in fields:
        fields.setdefault("image_token_index", fields.pop("image_token_id"))
    return fields


def _config(llava: Mapping, clip: Mapping, llama: Mapping, tiling: Mapping | None) -> LlavaConfig:
    return (LlavaConfig if tiling is None else LlavaNextConfig)(
        vision=clip_config(
            clip,
            feature_layer=llava["vision_feature_layer"],
            select=_SELECT[llava["vision_feature_select_strategy"]],
        ),
        projector=ProjectorConfig(
            in_width=clip["hidden_size"],
            out_width=llama["hidden_size"],
            depth=llava["projector_depth"],
            act=ACTIVATIONS[llava["projector_hidden_act"]],
            bias=llava["multimodal_projector_bias"],
            fold=llava["projector_fold"],
        ),
        lm=llama_config(llama, tied=llava["tie_word_embeddings"]),
        image_token=llava["image_token_index"],
        **(tiling or {}),
    )


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """Writes our config as the fields of a `config.json`; the inverse of `from_hf`.

    The vision tower ends at the layer that is read, because the layers above are never loaded. A
    Mistral without a window is written as what it is, a Llama.

    Args:
        config: the model.

    Returns:
        The fields. `projector_fold` and `projector_depth` are ours and appear only where they
        differ from what transformers has (1 and 2).
    """
    vision, projector, lm = config.vision, config.projector, config.lm
    ours = {"projector_fold": projector.fold, "projector_depth": projector.depth}
    return {
        **_kind(config),
        "image_token_index": config.image_token,
        "projector_hidden_act": HF_ACTIVATIONS[projector.act],
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": {v: k for k, v in _SELECT.items()}[vision.select],
        "tie_word_embeddings": lm.tied,
        **{field: value for field, value in ours.items() if value != _LLAVA[field][1]},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.run_layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch,
            "hidden_act": HF_ACTIVATIONS[vision.act],
            "layer_norm_eps": vision.eps,
        },
        "text_config": llama_fields(lm),
    }


def _kind(config: LlavaConfig) -> dict[str, Any]:
    """The fields that tell LLaVA from LLaVA-NeXT."""
    if not config.pinpoints:
        return {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    return {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": [list(size) for size in config.pinpoints],
        "use_image_newline_parameter": True,
    }


def read_clip(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The fields of a `vision_config`, for `clip_config`; what is wrong goes into `problems`."""
    clip = schema.read(fields, _CLIP, _CLIP_IGNORED, "vision_config.", problems)
    check_tower(clip, problems)
    return clip


def check_tower(tower: Mapping[str, Any], problems: list[str]) -> None:
    """The sizes of a vision transformer fit each other."""
    for part, whole in (("num_attention_heads", "hidden_size"), ("patch_size", "image_size")):
        schema.divides((part, tower[part]), (f"vision_config.{whole}", tower[whole]), problems)


def clip_config(clip: Mapping[str, Any], *, feature_layer: int, select: str) -> ClipConfig:
    """Our config of what `read_clip` found, and of what is read of the tower."""
    return ClipConfig(
        width=clip["hidden_size"],
        layers=clip["num_hidden_layers"],
        heads=clip["num_attention_heads"],
        mlp=clip["intermediate_size"],
        image_size=clip["image_size"],
        patch=clip["patch_size"],
        act=ACTIVATIONS[clip["hidden_act"]],
        eps=clip["layer_norm_eps"],
        feature_layer=feature_layer,
        select=select,
    )


def read_llama(fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The fields of a `text_config`, for `llama_config`; what is wrong goes into `problems`."""
    mistral = fields.get("model_type") == "mistral"
    llama = schema.read(fields, _MISTRAL if mistral else _LLAMA, IGNORED, "text_config.", problems)
    if mistral:
        _check_window(llama, problems)
    heads = "num_attention_heads", llama["num_attention_heads"]
    kv_heads = "num_key_value_heads", llama["num_key_value_heads"] or heads[1]
    schema.divides(kv_heads, (f"text_config.{heads[0]}", heads[1]), problems)
    if llama["head_dim"] is None:
        schema.divides(heads, ("text_config.hidden_size", llama["hidden_size"]), problems)
    if head_width(llama) % 2:
        problems.append(f"text_config has heads of odd width {head_width(llama)}")
    return llama | {"rope_theta": _rope_theta(llama, problems)}


def head_width(llama: Mapping[str, Any]) -> int:
    """Channels of a head."""
    return llama["head_dim"] or llama["hidden_size"] // llama["num_attention_heads"]


def llama_config(llama: Mapping[str, Any], *, tied: bool = False) -> DecoderConfig:
    """Our config of what `read_llama` found; `tied` where the whole model says so."""
    return DecoderConfig(
        vocab=llama["vocab_size"],
        width=llama["hidden_size"],
        layers=llama["num_hidden_layers"],
        heads=llama["num_attention_heads"],
        kv_heads=llama["num_key_value_heads"] or llama["num_attention_heads"],
        head_width=head_width(llama),
        mlp=llama["intermediate_size"],
        rope_theta=llama["rope_theta"],
        eps=llama["rms_norm_eps"],
        tied=bool(tied or llama["tie_word_embeddings"]),
    )


def llama_fields(lm: DecoderConfig) -> dict[str, Any]:
    """The `text_config` of a language model."""
    return {
        "model_type": "llama",
        "vocab_size": lm.vocab,
        "hidden_size": lm.width,
        "intermediate_size": lm.mlp,
        "num_hidden_layers": lm.layers,
        "num_attention_heads": lm.heads,
        "num_key_value_heads": lm.kv_heads,
        "head_dim": lm.head_width,
        "rms_norm_eps": lm.eps,
        "rope_theta": lm.rope_theta,
        "tie_word_embeddings": lm.tied,
    }


def _rope_theta(llama: Mapping[str, Any], problems: list[str]) -> float:
    """The base of the rotary angles; any rotary scaling is a problem."""
    thetas = {llama["rope_theta"]}
    for name in ("rope_parameters", "rope_scaling"):
        rope = schema.read(llama[name] or {}, _ROPE, (), f"text_config.{name}.", problems)
        thetas.add(rope["rope_theta"])
    thetas.discard(None)
    if len(thetas) > 1:
        problems.append(f"text_config has two values of rope_theta: {sorted(thetas)}")
    return float(next(iter(thetas), 10000.0))


def _check_window(llama: Mapping[str, Any], problems: list[str]) -> None:
    """A window as long as the longest row hides nothing; a shorter one we do not have."""
    window, longest = llama["sliding_window"], llama["max_position_embeddings"]
    if window is not None and window < longest:
        problems.append(
            f"text_config.sliding_window={window} is not supported where rows may have "
            f"max_position_embeddings={longest} tokens, only None"
        )


def _pinpoints(
    llava: Mapping[str, Any], clip: Mapping[str, Any], problems: list[str]
) -> dict[str, tuple[tuple[int, int], ...]]:
    """The field of LlavaNextConfig; its default where HF's config names none."""
    given, side = llava["image_grid_pinpoints"], clip["image_size"]
    if given is None:
        return {}
    if any(n % side or n > _MOST_TILES * side for pair in given for n in pair):
        problems.append(
            f"image_grid_pinpoints={files.shown(given)} is not supported, only pairs of multiples "
            f"of vision_config.image_size={side}, up to {_MOST_TILES} times"
        )
    return {"pinpoints": tuple(map(tuple, given))}


def _check_feature_layer(
    llava: Mapping[str, Any], clip: Mapping[str, Any], problems: list[str]
) -> None:
    """The layer that is read; the embedding below all layers (0) is no feature we have."""
    layers, at = clip["num_hidden_layers"], llava["vision_feature_layer"]
    if not (1 <= at <= layers or -layers <= at <= -1):
        problems.append(
            f"vision_feature_layer={at}: the vision tower has {layers} layers, so only "
            f"1 to {layers} or -{layers} to -1 are supported"
        )
