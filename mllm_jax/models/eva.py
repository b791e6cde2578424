"""The vision transformer of EVA (Fang et al. 2023), read at its last layer.

It has no norm before the first block, one after the last, and a bias
in the embedding of patches.
"""

from __future__ import annotations

import dataclasses

from mllm_jax.models import vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaConfig(vit.VitConfig):
    """An EVA vision tower, whose features are those of CLS and of every patch; see `VitConfig`."""

    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp: int = 6144
    image_size: int = 224
    patch: int = 14
    act: str = "gelu"
    eps: float = 1e-6

    @property
    def has_norm(self) -> bool:
        """Whether the features are normalised."""
        return True

    @classmethod
    def vit_g_14(cls) -> EvaConfig:
        """Return the config of ViT-g/14 at 224 pixels."""
        return cls()

    @classmethod
    def tiny(cls) -> EvaConfig:
        """Return a config for tests."""
        return cls(width=32, layers=3, heads=4, mlp=64, image_size=24, patch=6)
