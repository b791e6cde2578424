"""Receipts: the effect of each edit in a pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Receipt:
    """The effect of one edit in each layer. Padding is never counted.

    Attributes:
      edit: The kind and the site of the edit. Static.
      tokens: The number of tokens that it matched, int32[L].
      elements: The number of selected elements whose value changed, int32[L]; NaN counts as a
        change.
      norm: The L2 norm of the change, float32[L]; NaN if there is NaN before or after the edit.
    """

    edit: str = dataclasses.field(metadata={"static": True})
    tokens: Int[AnyArray, " L"]
    elements: Int[AnyArray, " L"]
    norm: Float[AnyArray, " L"]

    def __str__(self) -> str:
        return "{}: {}, {} tokens, {} elements changed, norm {}".format(*self.line())

    def line(self) -> tuple[str, str, int, int, str]:
        """Return edit, layers, tokens, changed elements, and the norm over all layers."""
        elements, norm = np.asarray(self.elements), np.asarray(self.norm)
        layers = np.flatnonzero(np.asarray(self.tokens))
        span = f"layers {layers.min()}-{layers.max()}" if len(layers) else "no layer"
        tokens, total = int(np.max(self.tokens, initial=0)), float(np.sqrt((norm**2).sum()))
        return self.edit, span, tokens, int(elements.sum()), f"{total:.4g}"

    def _repr_html_(self) -> str:
        return notebook.receipts([self])


def measure(
    before: Shaped[Array, ...],
    after: Shaped[Array, ...],
    mask: Bool[AnyArray, ...],
    token_axes: tuple[int, ...],
) -> tuple[Int[Array, ""], Int[Array, ""], Float[Array, ""]]:
    """Return tokens, elements and norm of one edit in one layer; see `Receipt`.

    Args:
      before: The tensor of the site.
      after: The tensor after the edit.
      mask: True where the edit acts; it broadcasts to the site.
      token_axes: The axes of the site that are rows and tokens.
    """
    rest = tuple(i for i in range(mask.ndim) if i not in token_axes)
    # Elsewhere there may be NaN as well, from an earlier edit.
    change = jnp.where(mask, at_least_float32(after) - at_least_float32(before), 0)
    squares = jnp.sum(change * change)
    changed = squares != 0  # the root has no derivative at 0, for an edit without effect
    return (
        jnp.sum(mask.any(rest), dtype=jnp.int32),
        jnp.sum(mask & (after != before), dtype=jnp.int32),
        jnp.where(changed, jnp.sqrt(jnp.where(changed, squares, 1)), 0),
    )
