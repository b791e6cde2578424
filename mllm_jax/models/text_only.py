"""Models that reads only text: a language model without a vision tower and a projector."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import tokens
from mllm_jax.batch import Batch, Layout
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.multimodal import ImageTokens, MultimodalConfig, MultimodalModel, Size
from mllm_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(MultimodalConfig):
    """The config of a model that reads only text.

    Attributes:
      vision: None.
      projector: None.
      lm: The language model.
      image_token: -1, no token.
    """

    vision: None = None  # type: ignore[assignment]  # a part that other models have
    projector: None = None  # type: ignore[assignment]
    image_token: int = -1

    @property
    def image_tokens(self) -> int:
        """0, because there are no image tokens."""
        return 0

    @property
    def token_grid(self) -> int:
        """0, because there are no image tokens."""
        return 0

    @property
    def tiles(self) -> int:
        """0, because a batch has no images."""
        return 0

    @property
    def tile_side(self) -> None:
        """None, because there are no tiles."""

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """The shape of no pixels."""
        return 0, 0, 3

    @property
    def largest(self) -> Size:
        """The size of no picture."""
        return 0, 0

    def layout(self, size: Size | None = None) -> Layout:
        """Return a layout without tiles and tokens."""
        del size
        return Layout(0, np.arange(0))

    def readers(self, batch: Batch) -> Bool[Array, "B I"]:
        """Return which tiles each row reads: there are none."""
        none: Any = np.zeros((len(batch.ids), 0), bool)
        return none

    def build(self, *, rngs: nnx.Rngs) -> TextModel:
        """Build the model with random weights."""
        return TextModel(self, rngs=rngs)


class TextModel(MultimodalModel):
    """A language model without vision tower and projector."""

    config: TextConfig

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.lm = Decoder(config.lm, rngs=rngs)

    def token_maps(self, batch: Batch) -> dict[str, tokens.TokenMap]:
        """Return the token map of the language model, [B, T]."""
        return dict.fromkeys(("lm", "logits"), batch.tokens)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the embedding."""
        return self.lm.embed[...].dtype

    def features(self, batch: Batch, taps) -> Float[Array, "I P E"]:
        """Return features of no picture."""
        return jnp.zeros((0, 0, 0), self.dtype)

    def images(self, batch: Batch, taps) -> ImageTokens:
        """Raise ValueError: only the batch of another model's processor has pictures."""
        raise ValueError("this model reads only text, but the batch has pictures")
