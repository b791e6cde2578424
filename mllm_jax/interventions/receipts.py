"""Receipts: what an edit did, reported by the edit itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook
from mllm_jax.numerics.precision import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Receipt:
    """What one edit did, per layer. Padding never counts.

    Attributes:
      edit: its kind and site. Static.
      tokens: int32[L], tokens it matched.
      elements: int32[L], elements whose value changed; of those selected, NaN counts as changed.
      norm: float32[L], root of the summed squares of the change; NaN where it made or met NaN.
    """

    edit: str = dataclasses.field(metadata={"static": True})
    tokens: Any
    elements: Any
    norm: Any

    def __str__(self) -> str:
        edit, *told = self.line()
        return "{}: {}, {} tokens, {} elements changed, norm {}".format(edit, *told)

    def line(self) -> tuple[str, str, int, int, str]:
        """Edit, layers, tokens, elements changed, norm of the change over all layers."""
        elements, norm = np.asarray(self.elements), np.asarray(self.norm)
        layers = np.flatnonzero(np.asarray(self.tokens))
        span = f"layers {layers.min()}-{layers.max()}" if len(layers) else "no layer"
        tokens, total = int(np.max(self.tokens, initial=0)), float(np.sqrt((norm**2).sum()))
        return self.edit, span, tokens, int(elements.sum()), f"{total:.4g}"

    def _repr_html_(self) -> str:
        return notebook.receipts([self])


def measure(before: jax.Array, after: jax.Array, mask: jax.Array, token_axes: tuple[int, ...]):
    """(tokens, elements, norm) of one edit in one layer.

    Args:
      mask: bool, broadcastable to the site, True where the edit acts.
      token_axes: the axes of the site that are rows and tokens.
    """
    rest = tuple(i for i in range(mask.ndim) if i not in token_axes)
    # Elsewhere there may be NaN too, of an edit before.
    change = jnp.where(mask, at_least_float32(after) - at_least_float32(before), 0)
    squares = jnp.sum(change * change)
    changed = squares != 0  # a root has no slope at 0, which is where an edit without effect is
    return (
        jnp.sum(mask.any(rest), dtype=jnp.int32),
        jnp.sum(mask & (after != before), dtype=jnp.int32),
        jnp.where(changed, jnp.sqrt(jnp.where(changed, squares, 1)), 0),
    )
