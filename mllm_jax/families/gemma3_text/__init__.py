"""Gemma 3 (Gemma Team 2025), the sizes that reads only text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder
from mllm_jax.families.base import Family
from mllm_jax.families.gemma3.model import language_model, tiny_language_model
from mllm_jax.families.gemma3.processor import END_OF_TURN
from mllm_jax.models.text_only import TextConfig
from mllm_jax.processors.text_only import TextProcessor
from mllm_jax.sharding import rules

_NAME, _MODEL, _HEAD = "gemma3_text", "model", "lm_head"
_SPELLINGS = (  # of a part of a larger model
    ("model.language_model.", f"{_MODEL}."),
    ("language_model.", ""),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig(TextConfig):
    """A Gemma 3 model that reads only text."""

    @classmethod
    def it_270m(cls) -> Gemma3TextConfig:
        """Return the config of Gemma 3 270M."""
        return cls._released(width=640, layers=18, mlp=2048)

    @classmethod
    def it_1b(cls) -> Gemma3TextConfig:
        """Return the config of Gemma 3 1B."""
        return cls._released(width=1152, layers=26, mlp=6912)

    @classmethod
    def _released(cls, **lm: Any) -> Gemma3TextConfig:
        return cls(lm=language_model(vocab=262144, heads=4, kv_heads=1, window=512, **lm))

    @classmethod
    def tiny(cls) -> Gemma3TextConfig:
        """Return a config for tests."""
        return cls(lm=tiny_language_model())


class Gemma3TextProcessor(TextProcessor):
    """A processor of texts, which end with the end of a turn."""

    end_of_turn = END_OF_TURN


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> Gemma3TextConfig:
    """Read the config of a checkpoint of the language model alone; see `from_hf` of LLaVA."""
    problems: list[str] = []
    text = decoder.read(fields, problems, types=(_NAME,), default=_NAME, prefix="")
    return fields_.checked(lambda: Gemma3TextConfig(lm=decoder.config(text)), source, problems)


def to_hf(config: Gemma3TextConfig) -> dict[str, Any]:
    """Return a config as the fields of a `config.json`; the inverse of `from_hf`."""
    return {"architectures": ["Gemma3ForCausalLM"], **decoder.to_hf(config.lm)}


def key_table(config: Gemma3TextConfig) -> tuple[keys.Row, ...]:
    """Return the key table, in the spelling of the hub."""
    return decoder.table(config.lm, _MODEL, _HEAD)


def canonical_key(key: str) -> str:
    """Return the canonical spelling of a key, which may be that of a part of a larger model."""
    return keys.respell(key.removeprefix(keys.PEFT_PREFIX), _SPELLINGS)


def is_unused(key: str, config: Gemma3TextConfig) -> bool:
    """Return whether a tensor is a buffer or the second copy of a tied embedding."""
    return decoder.is_unused(key, config.lm, _HEAD)


FAMILY = Family(
    name=_NAME,
    config=Gemma3TextConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    key_table=key_table,
    canonical_key=canonical_key,
    is_unused=is_unused,
    projector_prefix="multi_modal_projector.",  # unused: there is no projector
    sharding_rules=lambda config: rules.DECODER,
    processor=Gemma3TextProcessor,
    released={
        "gemma-3-270m": Gemma3TextConfig.it_270m,
        "gemma-3-1b": Gemma3TextConfig.it_1b,
    },
)
