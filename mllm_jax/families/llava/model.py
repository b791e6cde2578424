"""LLaVA (Liu et al. 2023): a tower of CLIP or SigLIP, a projector and a language model."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from flax import nnx

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.models.clip import ClipConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.models.projector import ProjectorConfig
from mllm_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig(MultimodalConfig):
    """A LLaVA model; for its attributes see `MultimodalConfig`."""

    vision: ClipConfig | SiglipConfig

    @property
    def image_tokens(self) -> int:
        """The number of image tokens of a tile."""
        return self.token_grid**2 + self.vision.feature_tokens - self.vision.grid**2

    @property
    def token_grid(self) -> int:
        """The number of rows, and of columns, of image tokens."""
        return self.vision.grid // self.projector.fold

    def build(self, *, rngs: nnx.Rngs) -> Llava:
        """Build the model with random weights."""
        return Llava(self, rngs=rngs)

    @classmethod
    def of(
        cls, vision: ClipConfig | SiglipConfig, lm: DecoderConfig, *, fold: int = 1, **fields: Any
    ) -> Self:
        """Return a LLaVA of a tower and a language model, with the usual two-layer projector."""
        projector = ProjectorConfig(in_width=vision.width, out_width=lm.width, fold=fold)
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def llava_1_5_7b(cls) -> LlavaConfig:
        """Return the config of LLaVA-1.5 7B."""
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.vicuna_7b())

    @classmethod
    def llava_1_5_13b(cls) -> LlavaConfig:
        """Return the config of LLaVA-1.5 13B."""
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.vicuna_13b())

    @classmethod
    def embedded(cls) -> LlavaConfig:
        """Return the config of the embedded model."""
        vision, lm = ClipConfig.vit_b_16(), DecoderConfig.smollm2_135m()
        return cls.of(vision, lm, fold=2, image_token=49152)

    @classmethod
    def tiny(cls) -> LlavaConfig:
        """Return a config for tests."""
        return cls.of(ClipConfig.tiny(), DecoderConfig.tiny(), fold=2, image_token=95)


class Llava(MultimodalModel):
    """The network of LLaVA."""

    config: LlavaConfig

    def token_maps(self, batch: Batch) -> dict[str, tokens.TokenMap]:
        """Return the token map of each module: vision [I, P], projector [I, P], LM [B, T]."""
        vision = self.config.vision
        grid, folded = (vision.grid,) * 2, (self.config.token_grid,) * 2
        full = vision.feature_tokens > vision.grid**2
        maps = {
            "vision": tokens.TokenMap.grid(batch.tile, grid, vision.has_cls, batch.is_real_tile),
            "projector": tokens.TokenMap.grid(batch.tile, folded, full, batch.is_real_tile),
        }
        return self.with_readers(batch, maps) | dict.fromkeys(("lm", "logits"), batch.tokens)
