"""Gemma 3 (Gemma Team 2025): a SigLIP whose patches are averaged, and a Gemma.

Each picture is one square. Most layers of the language model attend to a window; the tokens of a
picture attend to each other whatever their order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Self

from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.projector import ProjectorConfig
from mllm_jax.models.rotary import RopeScaling
from mllm_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(LlavaConfig):
    """A Gemma 3 model that reads pictures; for its attributes see `MultimodalConfig`."""

    vision: SiglipConfig
    image_token: int = 262144
    attends_forward: ClassVar[Literal["picture"]] = "picture"

    @classmethod
    def of(  # type: ignore[override]  # pools patches instead of folding them
        cls, vision: SiglipConfig, lm: DecoderConfig, *, pool: int, **fields: Any
    ) -> Self:
        """Return a Gemma 3 of a tower and a language model; pool² patches become one token."""
        projector = ProjectorConfig.pooled(vision.width, lm.width, pool=pool, eps=vision.eps)
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def it_4b(cls) -> Gemma3Config:
        """Return the config of Gemma 3 4B."""
        return cls._released(width=2560, layers=34, heads=8, kv_heads=4, mlp=10240)

    @classmethod
    def it_12b(cls) -> Gemma3Config:
        """Return the config of Gemma 3 12B."""
        return cls._released(width=3840, layers=48, heads=16, kv_heads=8, mlp=15360)

    @classmethod
    def it_27b(cls) -> Gemma3Config:
        """Return the config of Gemma 3 27B."""
        return cls._released(
            width=5376, layers=62, heads=32, kv_heads=16, mlp=21504, head_width=128,
            query_scale=168**-0.5,
        )  # fmt: skip

    @classmethod
    def _released(cls, **lm: Any) -> Gemma3Config:
        scaling = RopeScaling(kind="linear", factor=8.0)
        vision = dataclasses.replace(SiglipConfig.so400m_14_384(), image_size=896)
        return cls.of(
            vision, language_model(vocab=262208, window=1024, rope_scaling=scaling, **lm), pool=4
        )

    @classmethod
    def tiny(cls) -> Gemma3Config:
        """Return a config for tests."""
        return cls.of(SiglipConfig.tiny(), tiny_language_model(), pool=2, image_token=95)


def language_model(
    *, width: int, layers: int, window: int, every: int = 6, head_width: int = 256, **fields: Any
) -> DecoderConfig:
    """Return the config of a language model of Gemma 3.

    Args:
      width: The width D.
      layers: The number of layers L.
      window: The window of most layers.
      every: Every such layer, counted from 1, has no window.
      head_width: The head width H.
      **fields: Further fields.
    """
    same: dict[str, Any] = {
        "act": "gelu_tanh", "rope_theta": 1e6, "local_rope_theta": 1e4, "eps": 1e-6,
        "unit_offset": True, "qk_norm": True, "post_norms": True, "tied": True,
    }  # fmt: skip
    return DecoderConfig(
        width=width, layers=layers, head_width=head_width, embedding_scale=width**0.5,
        windows=tuple(window if n % every else 0 for n in range(1, layers + 1)),
        **same | fields,
    )  # fmt: skip


def tiny_language_model() -> DecoderConfig:
    """Return the config of a language model for tests."""
    return language_model(
        vocab=96, width=32, layers=4, window=6, every=2, heads=4, kv_heads=2, head_width=8, mlp=48,
        query_scale=24**-0.5, rope_scaling=RopeScaling(kind="linear", factor=8.0),
        local_rope_theta=100.0,
    )  # fmt: skip
