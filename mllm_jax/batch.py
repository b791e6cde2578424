"""A batch: what one forward pass reads, and how a picture becomes its tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, tokens
from mllm_jax.typing import Array, Int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one picture is read.

    Attributes:
      tiles: squares of it that the vision tower sees.
      patches: int32[n], which patch each of its tokens in the LM is, counted through its tiles; -1
        for a newline.
    """

    tiles: int
    patches: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one forward pass reads. Made by a processor; shapes are padded to a few lengths.

    Attributes:
      ids: int32[B, T], image placeholders included.
      position: int32[B, T], of each token in its row.
      tokens: the token map of the LM.
      image_token_index: int32[B, T], which image token stands here, counted through all tiles, and
        after the last of them the newline; -1 for text.
      pixels: float32[I, row, column, 3], normalised; I tiles over all rows, as many for each row.
      tile: int16[I], number of the tile within its row.
      is_real_tile: bool[I], False for tiles that only fill the batch.
      features: float[I, P, E] or None: vision features computed before; then pixels are not read.
      segment: int32[B, T] or None. Several questions on one picture share a row: a token sees
        segment 0 (the picture) and its own.
      labels: int32[B, A] or None, where the answer tokens are, -1 to fill up.
      qformer_ids: int32[I, T] or None: what a Q-Former is told, for each image, as its own tokens.
      qformer_kind: int8[I, T] or None, kinds of these tokens.
      processor: made the batch; turns tokens into text. Static.
    """

    ids: Any
    position: Any
    tokens: tokens.TokenMap
    image_token_index: Any
    pixels: Any
    tile: Any
    is_real_tile: Any
    features: Any = None
    segment: Any = None
    labels: Any = None
    qformer_ids: Any = None
    qformer_kind: Any = None
    processor: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def valid(self) -> Any:
        """bool[B, T], False for padding."""
        return self.tokens.kind != tokens.CODE["pad"]

    @property
    def last(self) -> Any:
        """int32[B], where each row's prompt ends."""
        return self.tokens.last.argmax(-1)

    def replace(self, **fields) -> Batch:
        """Return a copy with other values in some fields."""
        return dataclasses.replace(self, **fields)

    def prompts(self) -> Batch:
        """The batch with the prompts alone: what follows a prompt becomes padding.

        Raises:
          ValueError: a row holds several questions.
        """
        if self.segment is not None:
            _check_one_question(self.segment)
        xp = np if isinstance(self.tokens.kind, np.ndarray) else jnp
        after = xp.arange(self.ids.shape[-1]) > self.last[:, None]
        kind = xp.where(after, np.int8(tokens.CODE["pad"]), self.tokens.kind)
        prompts = dataclasses.replace(self.tokens, kind=kind)
        return self.replace(tokens=prompts, segment=None, labels=None)

    def _fingerprint_(self) -> list[Any]:
        """Its content: the arrays, in order."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "processor")
        return [getattr(self, name) for name in fields]

    def _repr_html_(self) -> str:
        return notebook.batch(self)


def _check_one_question(segment: Int[Array, "B T"]) -> None:
    """Raises where a row holds several questions: after which of them would one continue?"""
    if isinstance(segment, jax.core.Tracer):
        raise ValueError(
            "packed rows inside a transformation of JAX: nobody can see there how many questions a "
            "row holds; processor.unpack(batch) gives one question a row"
        )
    several = np.flatnonzero(np.asarray(segment).max(-1) > 1)
    if len(several):
        raise ValueError(
            f"row {several[0]} holds {np.asarray(segment)[several[0]].max()} packed questions: "
            "generate and score read one prompt a row; processor.unpack(batch) gives such rows"
        )
