"""PaliGemma (Beyer et al. 2024): the whole SigLIP, one linear map and a Gemma or Gemma 2.

Pictures come first, then the prompt; all these tokens attend to each other whatever their order.
The answer is causal.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Self

from flax import nnx

from mllm_jax.families.llava.model import Llava, LlavaConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.projector import ProjectorConfig
from mllm_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig(LlavaConfig):
    """A PaliGemma or PaliGemma 2 model; for its attributes see `MultimodalConfig`."""

    vision: SiglipConfig
    image_token: int = 257152
    attends_forward: ClassVar[Literal["prompt"]] = "prompt"

    def build(self, *, rngs: nnx.Rngs) -> PaliGemma:
        """Build the model with random weights."""
        return PaliGemma(self, rngs=rngs)

    @classmethod
    def of(  # type: ignore[override]  # has this tower alone
        cls, vision: SiglipConfig, lm: DecoderConfig, *, fold: int = 1, **fields: Any
    ) -> Self:
        """Return a PaliGemma of a tower and a language model."""
        projector = ProjectorConfig(in_width=vision.width, out_width=lm.width, depth=1, fold=fold)
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def gemma_2b(cls) -> PaliGemmaConfig:
        """Return the config of PaliGemma 3B at 224 pixels."""
        lm = gemma(width=2048, layers=18, heads=8, kv_heads=1, mlp=16384)
        return cls.of(_tower(), lm)

    @classmethod
    def gemma2_2b(cls) -> PaliGemmaConfig:
        """Return the config of PaliGemma 2 3B at 224 pixels."""
        return cls.of(_tower(), gemma2(width=2304, layers=26, heads=8, kv_heads=4, mlp=9216))

    @classmethod
    def gemma2_9b(cls) -> PaliGemmaConfig:
        """Return the config of PaliGemma 2 10B at 224 pixels."""
        return cls.of(_tower(), gemma2(width=3584, layers=42, heads=16, kv_heads=8, mlp=14336))

    @classmethod
    def gemma2_27b(cls) -> PaliGemmaConfig:
        """Return the config of PaliGemma 2 28B at 224 pixels."""
        lm = gemma2(
            width=4608, layers=46, heads=32, kv_heads=16, head_width=128, mlp=36864,
            query_scale=144**-0.5,
        )  # fmt: skip
        return cls.of(_tower(), lm)

    @classmethod
    def tiny(cls) -> PaliGemmaConfig:
        """Return the config of a PaliGemma 2 for tests."""
        lm = gemma2(
            vocab=96, width=32, layers=4, heads=4, kv_heads=2, head_width=8, mlp=48, window=24,
            query_scale=24**-0.5, attention_softcap=1.5, logit_softcap=2.0,
        )  # fmt: skip
        return cls.of(SiglipConfig.tiny(), lm, image_token=95)


class PaliGemma(Llava):
    """The network of PaliGemma, which is that of LLaVA with other parts."""

    config: PaliGemmaConfig


def _tower() -> SiglipConfig:
    """Return the config of the tower of the released models."""
    return dataclasses.replace(SiglipConfig.so400m_14_384(), image_size=224)


def gemma(*, width: int, **fields: Any) -> DecoderConfig:
    """Return the config of a Gemma.

    Args:
      width: The width D.
      **fields: Further fields.
    """
    same: dict[str, Any] = {
        "vocab": 257216, "act": "gelu_tanh", "eps": 1e-6, "unit_offset": True, "tied": True,
        "head_width": 256,
    }  # fmt: skip
    return DecoderConfig(width=width, embedding_scale=width**0.5, **same | fields)


def gemma2(*, layers: int, window: int = 4096, **fields: Any) -> DecoderConfig:
    """Return the config of a Gemma 2.

    Args:
      layers: The number of layers L.
      window: The window of every other layer, starting with the first.
      **fields: Further fields.
    """
    same: dict[str, Any] = {
        "post_norms": True, "attention_softcap": 50.0, "logit_softcap": 30.0,
        "window_within_block": False,
    }  # fmt: skip
    windows = tuple(0 if number % 2 else window for number in range(layers))
    return gemma(layers=layers, windows=windows, **same | fields)
