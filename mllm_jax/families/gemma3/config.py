"""Convert between the `config.json` of Gemma 3 and its config class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import decoder, siglip
from mllm_jax.families.gemma3.model import Gemma3Config

TEXT = "gemma3_text"
# The fields that are read, with the default of transformers.
_FIELDS = fields_.TOKEN_IDS | {
    "model_type": (schema.only("gemma3"), "gemma3"),
    "image_token_index": (schema.ID, 262144),
    "mm_tokens_per_image": (schema.whole(1, 2**16), 256),
    "tie_word_embeddings": (schema.FLAG, True),
    "text_config": (schema.PART, None),
    "vision_config": (schema.PART, None),
}
# Special tokens of the tokenizer enclose a picture.
_IGNORED = fields_.IGNORED | {
    "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index",
}  # fmt: skip


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> Gemma3Config:
    """Read the config of a Gemma 3 checkpoint; see `from_hf` of LLaVA."""
    problems: list[str] = []
    gemma = schema.read(fields_.renamed(fields), _FIELDS, _IGNORED, "", problems)
    tower = siglip.read(gemma["vision_config"] or {}, problems)
    text = decoder.read(gemma["text_config"] or {}, problems, types=(TEXT,), default=TEXT)
    patches = tower["image_size"] // tower["patch_size"]
    side = math.isqrt(gemma["mm_tokens_per_image"])
    if patches % side or side**2 != gemma["mm_tokens_per_image"]:
        problems.append(
            f"mm_tokens_per_image={gemma['mm_tokens_per_image']} is not the number of equal "
            f"squares of {patches} x {patches} patches"
        )

    def config() -> Gemma3Config:
        lm = decoder.config(text, tied=gemma["tie_word_embeddings"])
        # transformers applies the cap only in the text-only model, not here.
        lm = dataclasses.replace(lm, logit_softcap=None)
        vision, token = siglip.config(tower), gemma["image_token_index"]
        return Gemma3Config.of(vision, lm, pool=patches // side, image_token=token)

    return fields_.checked(config, source, problems)


def to_hf(config: Gemma3Config) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "image_token_index": config.image_token,
        "mm_tokens_per_image": config.image_tokens,
        "tie_word_embeddings": config.lm.tied,
        "vision_config": siglip.to_hf(config.vision),
        "text_config": decoder.to_hf(config.lm),
    }
