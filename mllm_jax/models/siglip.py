"""The vision transformer of SigLIP (Zhai et al. 2023), whole or read at one hidden layer.

It has no CLS token, and a bias in the embedding of patches. Idefics3 and SmolVLM have the same
tower: the positions of the patches of a full square tile are those of the table.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mllm_jax.models import vision_block, vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(vit.VitConfig):
    """A SigLIP vision tower; see `VitConfig`.

    Attributes:
      feature_layer: The hidden state that is read without the last norm, counted as in HF: 0 is
        the embedding, -1 the last layer. With None the whole tower is read, the norm included.
    """

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    image_size: int = 384
    patch: int = 14
    act: str = "gelu_tanh"
    eps: float = 1e-6
    feature_layer: int | None = None

    has_cls: ClassVar[bool] = False

    @property
    def run_layers(self) -> int:
        """The number of blocks below the feature layer; only these exist."""
        return vision_block.layers_below(self.feature_layer, self.layers)

    @property
    def has_norm(self) -> bool:
        """Whether the features are normalised."""
        return self.feature_layer is None

    @classmethod
    def so400m_14_384(cls) -> SiglipConfig:
        """Return the config of SigLIP So400m/14 at 384 pixels."""
        return cls()

    @classmethod
    def tiny(cls) -> SiglipConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)
