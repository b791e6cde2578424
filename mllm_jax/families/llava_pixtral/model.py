"""Pixtral in LLaVA's format: a Mistral 3 whose projector keeps every patch."""

from __future__ import annotations

import dataclasses
from typing import Self

from mllm_jax.families.mistral3.model import Mistral3Config
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.pixtral import PixtralConfig
from mllm_jax.models.projector import ProjectorConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaPixtralConfig(Mistral3Config):
    """A Pixtral model; see `Mistral3Config`."""

    @classmethod
    def projector_of(
        cls, vision: PixtralConfig, lm: DecoderConfig, *, act: str = "gelu", bias: bool = True
    ) -> ProjectorConfig:
        """Return the config of the projector between a tower and a language model."""
        return ProjectorConfig(in_width=vision.width, out_width=lm.width, act=act, bias=bias)

    @classmethod
    def pixtral_12b(cls) -> Self:
        """Return the config of Pixtral 12B."""
        lm = DecoderConfig(
            vocab=131072, width=5120, layers=40, kv_heads=8, mlp=14336, rope_theta=1e9
        )
        return cls.of(PixtralConfig.pixtral_12b(), lm)

    @classmethod
    def tiny(cls) -> Self:
        """Return a config for tests."""
        vision = dataclasses.replace(PixtralConfig.tiny(), patch=8)
        return cls.of(vision, DecoderConfig.tiny(), image_token=95)
