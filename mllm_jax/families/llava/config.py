"""Convert between the `config.json` of LLaVA and its config class.

Every field is read, known to have no effect, or refused by name: ignoring a field can make a model
subtly wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mllm_jax import files
from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, square_towers
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.projector import ProjectorConfig
from mllm_jax.models.siglip import SiglipConfig

TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_SELECT = {"default": "patch", "full": "full"}
# The fields that are read, with the default of transformers.
FIELDS = fields_.TOKEN_IDS | {
    "model_type": (schema.only("llava"), "llava"),
    "image_token_index": (schema.ID, 32000),
    "projector_hidden_act": (fields_.ACTIVATION, "gelu"),
    "vision_feature_layer": (schema.whole(-1024, 1024), -2),
    "vision_feature_select_strategy": (schema.only(*_SELECT), "default"),
    "multimodal_projector_bias": (schema.FLAG, True),
    "tie_word_embeddings": (schema.FLAG, False),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
    # Fields of this library; transformers has no such models.
    "projector_fold": (schema.whole(1, 64), 1),
    "projector_depth": (schema.whole(1, 16), 2),
}
_DEFAULT_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}  # the defaults of transformers without a vision_config
_IGNORED = fields_.IGNORED | {"vocab_size"}  # not used at this level


class Fields(NamedTuple):
    """The fields of a `config.json`.

    Attributes:
      llava: The fields of the model.
      tower: The fields of its vision tower.
      text: The fields of its language model.
    """

    llava: dict[str, Any]
    tower: dict[str, Any]
    text: dict[str, Any]


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> LlavaConfig:
    """Read the config of a LLaVA checkpoint.

    Args:
      fields: The content of `config.json`. Both `rope_theta` and `rope_parameters` are read.
      source: The name of the file, for the error.

    Raises:
      Refused: There are unknown fields or unsupported values; the message lists all.
    """
    problems: list[str] = []
    known = read(fields, FIELDS, source, problems)
    return fields_.checked(lambda: LlavaConfig(**parts(known)), source, problems)


def read(
    fields: Mapping[str, Any],
    table: schema.Table,
    source: object,
    problems: list[str],
    *,
    tower: Mapping[str, Any] = _DEFAULT_CLIP,
    text: str = "llama",
) -> Fields:
    """Read the fields of LLaVA or of a model that is built like it.

    Args:
      fields: The content of `config.json`.
      table: The fields of the model.
      source: The name of the file, for the error.
      problems: A list to which problems are appended.
      tower: The `vision_config` of models without one; its `model_type` is the default.
      text: The default model type of the language model.

    Raises:
      ValueError: The config is one of the original code.
    """
    if "mm_vision_tower" in fields:
        problem = (
            "a config of the original LLaVA code; replace it with the config.json of its "
            "transformers conversion (llava-hf/...), the tensors can stay as they are"
        )
        raise ValueError(files.refusal(source, [problem]))
    llava = schema.read(fields_.renamed(fields), table, _IGNORED, "", problems)
    kind = tower["model_type"]
    vision = square_towers.read(llava["vision_config"] or tower, problems, default=kind)
    lm = decoder.read(llava["text_config"] or {}, problems, types=TEXT_TYPES, default=text)
    select = _SELECT[llava["vision_feature_select_strategy"]]
    square_towers.check(vision, llava["vision_feature_layer"], select, problems)
    grid = "vision_config.image_size / patch_size", vision["image_size"] // vision["patch_size"]
    schema.divides(("projector_fold", llava["projector_fold"]), grid, problems)
    return Fields(llava, vision, lm)


def parts(known: Fields) -> dict[str, Any]:
    """Return the arguments of the config class: its parts and the image token."""
    llava, tower, text = known
    return {
        "vision": square_towers.config(
            tower,
            feature_layer=llava["vision_feature_layer"],
            select=_SELECT[llava["vision_feature_select_strategy"]],
        ),
        "projector": ProjectorConfig(
            in_width=tower["hidden_size"],
            out_width=text["hidden_size"],
            depth=llava["projector_depth"],
            act=fields_.ACTIVATIONS[llava["projector_hidden_act"]],
            bias=llava["multimodal_projector_bias"],
            fold=llava["projector_fold"],
        ),
        "lm": decoder.config(text, tied=llava["tie_word_embeddings"] or None),
        "image_token": llava["image_token_index"],
    }


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`.

    `projector_fold` and `projector_depth` are fields of this library. They appear only where they
    differ from what transformers supports (1 and 2).
    """
    kind = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    return kind | parts_to_hf(config)


def parts_to_hf(config: LlavaConfig) -> dict[str, Any]:
    """Return the fields that LLaVA and models built like it share; the inverse of `parts`.

    Raises:
      ValueError: The model reads SigLIP through its last norm, for which LLaVA has no field.
    """
    vision, projector, lm = config.vision, config.projector, config.lm
    if isinstance(vision, SiglipConfig) and vision.has_norm:
        raise ValueError(
            "a LLaVA reads SigLIP without its last norm, but this model uses that norm: build it "
            "with SiglipConfig(feature_layer=-1), or a checkpoint would lose the norm"
        )
    own = {"projector_fold": projector.fold, "projector_depth": projector.depth}
    return {
        "image_token_index": config.image_token,
        "projector_hidden_act": fields_.HF_ACTIVATIONS[projector.act],
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if drops_cls(vision) else "full",
        "tie_word_embeddings": lm.tied,
        **{field: value for field, value in own.items() if value != FIELDS[field][1]},
        "vision_config": square_towers.to_hf(vision),
        "text_config": decoder.to_hf(lm),
    }


def drops_cls(vision: ClipConfig | SiglipConfig) -> bool:
    """Return whether the features of a tower exclude its CLS token."""
    return vision.has_cls and vision.feature_tokens == vision.grid**2
