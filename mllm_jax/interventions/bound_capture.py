"""A capture in the shapes of a model and a batch, as the pass carries it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites
from mllm_jax.tokens import TokenMap
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """The positions of the tokens of a site in the data.

    Attributes:
      example: The row of the batch that reads each row or tile, counted without rows that only pad
        the batch, int32[B].
      token: The number of each token in its row without padding, or in its tile, int32[B, T].
      tile: The tile within the row, int16[B, T]; -1 for text.
      row: The row on the grid of the tile, int16[B, T]; -1 elsewhere.
      column: The column on that grid, int16[B, T]; -1 elsewhere.
      examples: The number of rows that do not only pad the batch, int32[].
    """

    example: Int[AnyArray, " B"]
    token: Int[AnyArray, "B T"]
    tile: Int[AnyArray, "B T"]
    row: Int[AnyArray, "B T"]
    column: Int[AnyArray, "B T"]
    examples: Int[AnyArray, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundCapture:
    """A capture in the shapes of a model and a batch.

    Attributes:
      form: A name of `forms.FORMS`. Static.
      site: The site that it reads. Static.
      by: The kinds of token, or the tiles, that the result is grouped by, or None. Static.
      k: The number of words of a lens. Static.
      count: The number of captured layers. Static.
      single: Whether the layer axis is dropped at the end. Static.
      slots: The slot that carries each layer's result, int32[L], `count` for layers that are not
        captured; None stacks all layers.
      order: The slots of the captured layers, int32[count]; a layer that is listed twice has one
        slot.
      absent: Which of the captured layers the model does not have, bool[count]; possible only for
        traced indices.
      units: The units that are returned, int32[n], or None for all.
      tokens: The tokens that are read, bool[B, T].
      kind: The kind of each token, int8[B, T].
      on: The keys of an attention, bool[B, S], or None.
      rows: False for rows that only pad the batch, bool[B].
      readers: Which rows read each tile, bool[B, I], if the site has tiles in place of rows.
      edges: The edges of bins, float32[bins - 1], or None.
      places: The positions of the tokens in the data, if the form needs them; or None.
      keys: The token map of the keys of an attention, if the form needs it; or None.
      heads: Whether an attention is of each head or their mean. Static.
      state: The value that the form carries from layer to layer, see `forms.Form.carry`; or None.
    """

    form: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    by: tuple[str, ...] | None = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    single: bool = dataclasses.field(metadata={"static": True})
    slots: Int[AnyArray, " L"] | None
    order: Int[AnyArray, " count"] | None
    absent: Bool[AnyArray, " count"] | None
    units: Int[AnyArray, " n"] | None
    tokens: Bool[AnyArray, "B T"]
    kind: Int[AnyArray, "B T"]
    on: Bool[AnyArray, "B S"] | None
    rows: Bool[AnyArray, " B"]
    readers: Bool[AnyArray, "B I"] | None
    edges: Float[AnyArray, " n"] | None = None
    places: Places | None = None
    keys: TokenMap | None = None
    heads: str = dataclasses.field(default="each", metadata={"static": True})
    state: Any = None

    def map_tokens(self, part: Callable[[AnyArray], AnyArray]) -> BoundCapture:
        """Return the capture of some of the tokens, by a function of arrays [B, T]."""

        def parts(of: Any, names: tuple[str, ...]) -> Any:
            return dataclasses.replace(of, **{name: part(getattr(of, name)) for name in names})

        places = self.places and parts(self.places, ("token", "tile", "row", "column"))
        return parts(dataclasses.replace(self, places=places), ("tokens", "kind"))

    def finish(self, carried: Any) -> Any:
        """Return the carried slots in the order of the capture; absent layers are NaN, or 0."""
        order, absent = self.order, self.absent
        assert order is not None and absent is not None, "only a carried capture has slots"

        def pick(array):
            array = array[order]
            is_absent = absent.reshape(-1, *(1,) * (array.ndim - 1))
            array = jnp.where(is_absent, jnp.asarray(absent_value(array), array.dtype), array)
            return array[0] if self.single else array

        return jax.tree.map(pick, carried)


def absent_value(array: Shaped[Array, ...]) -> float:
    """Return the value for layers and units that the model does not have: NaN, or 0."""
    return np.nan if jnp.issubdtype(array.dtype, jnp.inexact) else 0
