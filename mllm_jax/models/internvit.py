"""InternViT (Chen et al. 2024), the vision transformer of InternVL.

Its blocks scale their outputs, and may normalise queries and keys.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mllm_jax.models import vision_block, vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVitConfig(vit.VitConfig):
    """An InternViT vision tower; see `VitConfig`.

    Attributes:
      norm: Layer norms or RMS norms.
      qkv_bias: Whether the maps to queries, keys and values have a bias.
      qk_norm: Whether queries and keys are normalised.
      final_norm: Whether a norm follows the last block.
      feature_layer: The hidden state that is read, counted as in HF: 0 is the embedding, -1 the
        output of the tower, after its final norm.
      select: "patch" drops the CLS token of the features, "full" keeps it.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 448
    patch: int = 14
    act: str = "gelu"
    eps: float = 1e-6
    norm: vision_block.Norm = "layer"
    qkv_bias: bool = True
    qk_norm: bool = False
    final_norm: bool = False
    feature_layer: int = -1
    select: Literal["patch", "full"] = "patch"

    @property
    def run_layers(self) -> int:
        """The number of blocks below the feature layer; only these exist."""
        return vision_block.layers_below(self.feature_layer, self.layers)

    @property
    def keeps_cls(self) -> bool:
        """Whether the CLS token is one of the features."""
        return self.select == "full"

    @property
    def has_norm(self) -> bool:
        """Whether the features are normalised."""
        return self.final_norm and self.feature_layer == -1

    @property
    def block(self) -> vision_block.BlockConfig:
        """The config of each block."""
        return dataclasses.replace(
            super().block,
            norm=self.norm, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm, layer_scale=True,
        )  # fmt: skip

    @classmethod
    def internvit_300m(cls) -> InternVitConfig:
        """Return the config of InternViT 300M at 448 pixels."""
        return cls()

    @classmethod
    def internvit_6b(cls) -> InternVitConfig:
        """Return the config of InternViT 6B at 448 pixels."""
        return cls(
            width=3200, layers=45, heads=25, mlp=12800, norm="rms", qkv_bias=False, qk_norm=True
        )

    @classmethod
    def tiny(cls) -> InternVitConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)
