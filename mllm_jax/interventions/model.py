"""The protocol of models, which every family implements."""

from __future__ import annotations

from typing import Any, Protocol

from mllm_jax.batch import Batch
from mllm_jax.interventions.tap import Taps
from mllm_jax.models.cache import Cache
from mllm_jax.positions import Positions
from mllm_jax.tokens import TokenMap
from mllm_jax.typing import AnyArray, Array, Float, Int


class LanguageModel(Protocol):
    """The language model within a multimodal model.

    Attributes:
      layers: Its layers, whose arrays lead with L.
      norm: The norm before the head.
    """

    layers: Any
    norm: Any

    def embeddings(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the word embeddings of token ids."""

    def unembedding(self, ids: Int[AnyArray, "*B"]) -> Float[Array, "*B D"]:
        """Return the rows of the head."""

    def lens(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return the logits of a residual as if it were the last."""

    def layers_one_by_one(self) -> tuple[Any, ...]:
        """Return the layers with separate arrays."""


class Model(Protocol):
    """A multimodal model, a pytree, as `run`, `generate`, `score`, `sweep` and `reduce` use it."""

    @property
    def config(self) -> Any:
        """The configuration that the model was built from."""

    @property
    def lm(self) -> LanguageModel:
        """The language model."""

    def token_maps(self, batch: Batch) -> dict[str, TokenMap]:
        """Return the token map of each module, and of sites that have their own."""

    def unshared(self, batch: Batch) -> Batch:
        """Return the batch with separate tiles for each row."""

    def features(self, batch: Batch, taps: Taps) -> Float[Array, "I P E"]:
        """Return the features of the vision tower that the projector reads."""

    def __call__(self, batch: Batch, taps: Taps) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the final normalised states of every token, and their keys and values."""

    def embed(
        self, batch: Batch, taps: Taps
    ) -> tuple[Float[Array, "B T D"], Float[Array, "k B T D"] | None]:
        """Return embeddings with the images merged, and features added after the first k layers."""

    def read(
        self,
        x: Float[Array, "B T D"],
        positions: Positions,
        taps: Taps,
        past: Cache | None = None,
        deepstack: Float[Array, "k B T D"] | None = None,
        layers: tuple[Any, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run the language model on embeddings into which the images are already merged."""

    def logits(self, x: Float[Array, "B T D"], taps: Taps) -> Float[Array, "B T V"]:
        """Return the float32 logits of normalised states."""
