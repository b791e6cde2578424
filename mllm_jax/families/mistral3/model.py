"""Mistral 3 (Mistral Small 3.1 and 3.2): Pixtral's tower, a patch merger and a Mistral.

Each picture is read at its native resolution; a token separates the rows of its image tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from flax import nnx

from mllm_jax.batch import Layout
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.free_grid import FreeGridConfig, FreeGridModel
from mllm_jax.models.multimodal import Size
from mllm_jax.models.pixtral import PixtralConfig, PixtralVision
from mllm_jax.models.projector import ProjectorConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistral3Config(FreeGridConfig):
    """A Mistral 3 model; see `FreeGridConfig`."""

    vision: PixtralConfig  # type: ignore[assignment]  # narrower than that of the base
    image_token: int = 10

    def layout_of_grid(self, grid: Size) -> Layout:
        """Return the layout of a picture with these rows and columns of patches: row by row."""
        rows, columns = (n // self.merge for n in grid)
        return dataclasses.replace(super().layout_of_grid(grid), runs=(columns,) * rows)

    def build(self, *, rngs: nnx.Rngs) -> Mistral3:
        """Build the model with random weights."""
        return Mistral3(self, rngs=rngs)

    @classmethod
    def of(cls, vision: PixtralConfig, lm: DecoderConfig, **fields: Any) -> Self:
        """Return a model of a tower and a language model, with the projector between them.

        Args:
          vision: The tower.
          lm: The language model.
          **fields: `act` and `bias` of the projector, and `image_token`.
        """
        how = {name: fields.pop(name) for name in ("act", "bias") if name in fields}
        side = vision.image_size // vision.patch
        return cls(
            vision=vision,
            projector=cls.projector_of(vision, lm, **how),
            lm=lm,
            largest_grid=(side, side),
            **fields,
        )

    @classmethod
    def projector_of(
        cls, vision: PixtralConfig, lm: DecoderConfig, *, act: str = "gelu", bias: bool = False
    ) -> ProjectorConfig:
        """Return the config of the projector between a tower and a language model."""
        return ProjectorConfig.merging(
            vision.width, lm.width, eps=lm.eps, fold=vision.merge, act=act, bias=bias
        )

    @classmethod
    def mistral_small_3_1(cls) -> Self:
        """Return the config of Mistral Small 3.1 24B."""
        lm = DecoderConfig(
            vocab=131072, width=5120, layers=40, kv_heads=8, mlp=32768, rope_theta=1e9
        )
        return cls.of(PixtralConfig.mistral_small_3_1(), lm)

    @classmethod
    def tiny(cls) -> Self:
        """Return a config for tests."""
        vision = dataclasses.replace(PixtralConfig.tiny(), merge=2)
        return cls.of(vision, DecoderConfig.tiny(), image_token=95)


class Mistral3(FreeGridModel):
    """The network of Mistral 3 and of Pixtral in LLaVA's format."""

    config: Mistral3Config
    vision: PixtralVision
