"""The axis letters of the library, and the types of arrays and sequences used in signatures.

Every shape in a docstring, an einsum, a site or a sharding rule is spelled with these letters:

    B batch               T query positions     S key positions      L layers (always leading)
    D LM width            E vision width        N query heads        K key-value heads
    H head width          F MLP neurons         V vocabulary         P patches
    I image tiles         Q query tokens        W Q-Former width
    R edits in a sweep    C classes             M latents
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

Item = TypeVar("Item", covariant=True)

# A NumPy array if its values are known, a JAX array if they are computed or traced.
AnyArray = np.ndarray | jax.Array

LETTERS = {
    "B": "batch",
    "T": "query positions",
    "S": "key positions",
    "L": "layers",
    "D": "LM width",
    "E": "vision width",
    "N": "query heads",
    "K": "key-value heads",
    "H": "head width",
    "F": "MLP neurons",
    "V": "vocabulary",
    "P": "patches",
    "I": "image tiles",
    "Q": "query tokens",
    "W": "Q-Former width",
    "R": "edits in a sweep",
    "C": "classes",
    "M": "latents of a dictionary",
}


@runtime_checkable
class Indexed(Protocol[Item]):
    """Items by index, which may be computed when they are read, such as a list.

    It need not raise IndexError at its end: its length determines it.
    """

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __getitem__(self, number: int, /) -> Item:
        """Return the item of this number."""
        ...


__all__ = [
    "LETTERS",
    "AnyArray",
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Indexed",
    "Int",
    "Num",
    "Shaped",
]
