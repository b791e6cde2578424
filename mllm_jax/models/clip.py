"""The vision transformer of CLIP (Radford et al. 2021), read at one hidden layer.

Layers above that layer are neither loaded nor run, so they offer no sites.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mllm_jax.models import vision_block, vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig(vit.VitConfig):
    """A CLIP vision tower; see `VitConfig`.

    Attributes:
      act: "quick_gelu" (OpenAI's weights) or "gelu".
      feature_layer: The hidden state that is read, counted as in HF: 0 is the embedding, -1 the
        last layer.
      select: "patch" drops the CLS token of the features, "full" keeps it.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 336
    patch: int = 14
    act: str = "quick_gelu"
    eps: float = 1e-5
    feature_layer: int = -2
    select: str = "patch"

    patch_bias: ClassVar[bool] = False
    has_pre_norm: ClassVar[bool] = True

    @property
    def run_layers(self) -> int:
        """The number of blocks below the feature layer; only these exist."""
        return vision_block.layers_below(self.feature_layer, self.layers)

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token is one of the features."""
        return self.select == "full"

    @classmethod
    def vit_l_14_336(cls) -> ClipConfig:
        """Return the config of ViT-L/14 at 336 pixels."""
        return cls()

    @classmethod
    def vit_b_16(cls) -> ClipConfig:
        """Return the config of ViT-B/16 at 224 pixels."""
        return cls(width=768, layers=12, heads=12, mlp=3072, image_size=224, patch=16)

    @classmethod
    def tiny(cls) -> ClipConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)
