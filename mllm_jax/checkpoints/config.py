"""Between a Hugging Face `config.json` and our configs.

Every field is read, known to be irrelevant, or refused by name: a field that is skipped in silence
is how a model comes out subtly wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.llama import LlamaConfig
from mllm_jax.models.llava import LlavaConfig
from mllm_jax.models.llava_next import LlavaNextConfig
from mllm_jax.models.projector import ProjectorConfig

# The fields we read, with the value HF gives to a field that is not there.
_LLAVA = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "text_config": None,
    "vision_config": None,
    # Ours: transformers has no such fields, and no such models.
    "projector_fold": 1,
    "projector_depth": 2,
}
_LLAVA_NEXT = _LLAVA | {"image_grid_pinpoints": None}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_LLAVA_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}  # what LlavaConfig uses when there is no vision_config at all
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}

# The fields that may hold one thing only, because we have no other.
_LLAVA_FIXED = {"model_type": ("llava",)}
_LLAVA_NEXT_FIXED = {
    "model_type": ("llava_next",),
    "vision_feature_select_strategy": ("default",),
    "use_image_newline_parameter": (True,),
}
_CLIP_FIXED = {"model_type": ("clip_vision_model",), "num_channels": (3,)}
_LLAMA_FIXED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
}
_MISTRAL_FIXED = {"model_type": ("mistral",), "hidden_act": ("silu", "swish")}

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

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
HF_ACTIVATIONS = {ours: hf for hf, ours in ACTIVATIONS.items()}
_SELECT = {"default": "patch", "full": "full"}


class Unknown(str):
    """A problem with a config that does not keep us from knowing which tensors belong to it."""


class Refused(ValueError):
    """A `config.json` that we do not read.

    Attributes:
        config: the model without the fields we do not know, so that its tensors can be looked at
            as well; None where other things are wrong.
    """

    def __init__(self, source: object, problems: list[str], config: LlavaConfig | None = None):
        super().__init__(f"{source}: {'; '.join(problems)}")
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
        raise ValueError(
            f"{source}: a config of the original LLaVA code; give it the config.json of its "
            "transformers conversion (llava-hf/...), the tensors are read as they are"
        )
    problems: list[str] = []
    fields = dict(fields)
    if "image_token_id" in fields:
        fields.setdefault("image_token_index", fields.pop("image_token_id"))
    tiled = fields.get("model_type") == "llava_next"
    known, fixed = (_LLAVA_NEXT, _LLAVA_NEXT_FIXED) if tiled else (_LLAVA, _LLAVA_FIXED)
    llava = read(fields, known, fixed, _LLAVA_IGNORED, "", problems)
    vision_defaults = _CLIP if llava["vision_config"] else _CLIP | _LLAVA_CLIP
    clip = read_clip(llava["vision_config"] or {}, problems, vision_defaults)
    llama = read_llama(llava["text_config"] or {}, problems)
    check_choice(llava, "projector_hidden_act", ACTIVATIONS, "", problems)
    check_choice(llava, "vision_feature_select_strategy", _SELECT, "", problems)
    check_integer(llava, "vision_feature_layer", "", problems)
    if all(isinstance(problem, Unknown) for problem in problems):
        _check_feature_layer(llava, clip, problems)
        tiling = _pinpoints(llava, clip, problems) if tiled else None
    return settle(lambda: _config(llava, clip, llama, tiling), source, problems)


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
        **{field: value for field, value in ours.items() if value != _LLAVA[field]},
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


def read_clip(
    fields: Mapping[str, Any], problems: list[str], known: Mapping[str, Any] = _CLIP
) -> dict[str, Any]:
    """The fields of a `vision_config`, for `clip_config`; what is wrong goes into `problems`."""
    clip = read(fields, known, _CLIP_FIXED, _CLIP_IGNORED, "vision_config.", problems)
    check_choice(clip, "hidden_act", ACTIVATIONS, "vision_config.", problems)
    check_integer(clip, "image_size", "vision_config.", problems)
    check_integer(clip, "patch_size", "vision_config.", problems)
    return clip


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
    known, fixed = (_MISTRAL, _MISTRAL_FIXED) if mistral else (_LLAMA, _LLAMA_FIXED)
    llama = read(fields, known, fixed, IGNORED, "text_config.", problems)
    if mistral:
        _check_window(llama, problems)
    return llama | {"rope_theta": _rope_theta(llama, problems)}


def llama_config(llama: Mapping[str, Any], *, tied: bool = False) -> LlamaConfig:
    """Our config of what `read_llama` found; `tied` where the whole model says so."""
    return LlamaConfig(
        vocab=llama["vocab_size"],
        width=llama["hidden_size"],
        layers=llama["num_hidden_layers"],
        heads=llama["num_attention_heads"],
        kv_heads=llama["num_key_value_heads"] or llama["num_attention_heads"],
        head_width=llama["head_dim"] or llama["hidden_size"] // llama["num_attention_heads"],
        mlp=llama["intermediate_size"],
        rope_theta=llama["rope_theta"],
        eps=llama["rms_norm_eps"],
        tied=bool(tied or llama["tie_word_embeddings"]),
    )


def llama_fields(lm: LlamaConfig) -> dict[str, Any]:
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


def read(
    fields: Mapping[str, Any],
    known: Mapping[str, Any],
    fixed: Mapping[str, tuple],
    ignored: frozenset[str],
    prefix: str,
    problems: list[str],
) -> dict[str, Any]:
    """The known fields, filled with HF's defaults; what is wrong goes into `problems`."""
    if fields.get("model_type", fixed["model_type"][0]) not in fixed["model_type"]:
        fields = {"model_type": fields["model_type"]}  # of another model every field is unknown
    for name, value in fields.items():
        if name in fixed and value not in fixed[name]:
            problems.append(f"{prefix}{name}={value!r} is not supported, only {fixed[name][0]!r}")
        elif name not in known and name not in fixed and name not in ignored:
            near = _nearest(name, [*known, *fixed])
            problems.append(Unknown(f"unknown field {prefix}{name}{near}"))
    return {name: fields.get(name, default) for name, default in known.items()}


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]})" if near else ""


def _rope_theta(llama: Mapping[str, Any], problems: list[str]) -> float:
    """The base of the rotary angles; any rotary scaling is a problem."""
    thetas = {llama["rope_theta"]}
    for name in ("rope_parameters", "rope_scaling"):
        rope = dict(llama[name] or {})
        thetas.add(rope.pop("rope_theta", None))
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        if kind != "default":
            problems.append(f"text_config.{name} of type {kind!r} is not supported, only 'default'")
        elif rope:
            problems.append(f"unknown field text_config.{name}.{', '.join(sorted(rope))}")
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
    pairs = [tuple(size) if isinstance(size, (list, tuple)) else () for size in given]
    if not pairs or any(len(p) != 2 or min(p) < 1 or any(n % side for n in p) for p in pairs):
        problems.append(
            f"image_grid_pinpoints={given!r} is not supported, only pairs of multiples of "
            f"vision_config.image_size={side}"
        )
    return {"pinpoints": tuple(pairs)}


def check_choice(
    fields: Mapping[str, Any], name: str, choices: Mapping, prefix: str, problems: list[str]
) -> None:
    """A field that must be one of some values."""
    if fields[name] not in choices:
        problems.append(
            f"{prefix}{name}={fields[name]!r} is not supported, only {', '.join(sorted(choices))}"
        )


def check_integer(fields: Mapping[str, Any], name: str, prefix: str, problems: list[str]) -> None:
    """A field that may also be a list elsewhere."""
    if not isinstance(fields[name], int):
        problems.append(f"{prefix}{name}={fields[name]!r} is not supported, only one integer")


def _check_feature_layer(
    llava: Mapping[str, Any], clip: Mapping[str, Any], problems: list[str]
) -> None:
    layers, at = clip["num_hidden_layers"], llava["vision_feature_layer"]
    if not -layers <= at <= layers or not at:
        problems.append(
            f"vision_feature_layer={at}: the vision tower has {layers} layers, counted from 1 or "
            "back from -1 (its embedding, before them, is not read by this library)"
        )
