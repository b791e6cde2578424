"""Selections of entries of one axis, from the brackets after a site.

A selection is data. Its form (all, one, a range, indices, a mask, pairs) is structure.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from mllm_jax.typing import AnyArray, Bool, Int

_ABOVE_FEATURE_LAYER = "; layers above the feature layer never reach the LM and do not run"
END = 2**30  # the open end of a slice
Form = Literal["all", "one", "range", "index", "mask", "pairs"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """A selection of entries of one axis: all, a range, a list of indices, or a mask.

    Attributes:
      form: "all", "one", "range", "index", "mask" or "pairs". Static.
      value: The data: int32[] for one, int32[3] for a range, int32[n] for indices, bool[n] for a
        mask, int32[n, 2] for pairs of a layer and a unit; None for all.
    """

    form: Form = dataclasses.field(metadata={"static": True})
    value: Any = None

    @classmethod
    def parse(cls, item: Any) -> Selection:
        """Return the selection for one part of the brackets after a site.

        Raises:
          ValueError: A slice has a step below 1.
          TypeError: The part holds neither integers, slices of integers nor masks.
          IndexError: Integers have a shape other than [], [n] or [n, 2], or a mask other than [n]
            or [L, F].
        """
        if item is None:
            return ALL
        if isinstance(item, slice):
            given = item.start, item.stop, item.step
            if all(part is None for part in given):
                return ALL
            defaults = zip(given, (0, END, 1), strict=True)
            parts = [default if part is None else part for part, default in defaults]
            if is_concrete(parts[2]) and parts[2] < 1:
                raise ValueError(f"slice {item} of an address: the step must be positive")
            bounds = as_array(parts)
            if not np.issubdtype(bounds.dtype, np.integer):
                raise TypeError(f"slice {item} of an address holds integers, not {bounds.dtype}")
            return cls("range", as_int32(bounds))
        array = as_array(item)
        if array.dtype == bool:
            if array.ndim not in (1, 2):
                raise IndexError(f"a mask of an address has one or two axes, not {array.ndim}")
            return cls("mask", array)
        if array.size == 0:
            return cls("index", np.zeros((0,), np.int32))
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"an address holds integers, slices or masks, not {array.dtype}")
        if array.ndim > 2 or (array.ndim == 2 and array.shape[1] != 2):
            raise IndexError(
                f"an address of shape {tuple(array.shape)}: integers are one index, a list [n], "
                "or pairs of layer and unit [n, 2]"
            )
        return cls(("one", "index", "pairs")[array.ndim], as_int32(array))

    def mask(self, size: int, what: str) -> Bool[AnyArray, " size"]:
        """Return the selected entries as a mask.

        Args:
          size: The length of the axis.
          what: The name of the axis in error messages: "lm.mlp.act: layer".

        Raises:
          ValueError: Known indices are out of range, or a mask has another length.
        """
        if self.form == "all":
            return np.ones((size,), bool)
        if self.form == "mask":
            if self.value.shape[-1] != size:
                raise ValueError(
                    f"{what} mask has {self.value.shape[-1]} entries, but the model has {size}"
                )
            return self.value
        xp = np if is_concrete(self.value) else jax.numpy
        if self.form == "range":
            start, stop, step = self.value[0], self.value[1], self.value[2]
            at = xp.arange(size)
            start = xp.maximum(xp.where(start < 0, start + size, start), 0)
            stop = xp.where(stop < 0, stop + size, stop)
            return (at >= start) & (at < stop) & ((at - start) % step == 0)
        self._check_is_no_mask(size, what)
        return (xp.arange(size)[:, None] == self.entries(size, what)).any(1)

    def entries(self, size: int, what: str) -> Int[AnyArray, " n"]:
        """Return the indices, counted from the start.

        Known indices out of range raise an error; traced ones become `size`, which is no entry.
        """
        xp = np if is_concrete(self.value) else jax.numpy
        index = xp.atleast_1d(self.value)
        if xp is np and index.size and (index.min() < -size or index.max() >= size):
            wrong = index[(index < -size) | (index >= size)][0]
            is_vision = what.startswith("vision.") and what.endswith("layer")
            note = _ABOVE_FEATURE_LAYER if is_vision else ""
            raise ValueError(
                f"{what} {wrong} is out of range: the model has {size} (0 to {size - 1}){note}"
            )
        index = xp.where(index < 0, index + size, index)
        return xp.where((index >= 0) & (index < size), index, size)

    def _check_is_no_mask(self, size: int, what: str) -> None:
        """Raise an error for known indices that are a mask in the form of integers."""
        if self.form != "index" or not is_concrete(self.value) or len(self.value) != size:
            return
        if size > 2 and np.isin(self.value, (0, 1)).all():
            raise ValueError(
                f"{what}: {size} zeros and ones, one for each entry, would be read as the indices "
                "0 and 1: give a mask as bool, mask.astype(bool), or list an index once"
            )

    def pairs_mask(self, layers: int, width: int, name: str) -> Bool[AnyArray, "L width"]:
        """Return pairs as a mask."""
        layer = Selection("index", self.value[:, 0]).entries(layers, f"{name}: layer")
        unit = Selection("index", self.value[:, 1]).entries(width, f"{name}: unit")
        if is_concrete(self.value):
            mask = np.zeros((layers, width), bool)
            mask[layer, unit] = True
            return mask
        return jax.numpy.zeros((layers, width), bool).at[layer, unit].set(True, mode="drop")

    def indices(self, size: int, what: str) -> Int[AnyArray, " n"]:
        """Return the indices of a selection whose size is static, for a capture."""
        if self.form == "pairs" or (self.form == "mask" and self.value.ndim > 1):
            raise ValueError(
                f"{what}: a capture takes the same units in every layer, "
                f"not {'pairs' if self.form == 'pairs' else 'a mask'}"
            )
        if self.form in ("index", "one"):
            self._check_is_no_mask(size, what)
            return self.entries(size, what)
        if not is_concrete(self.value):
            raise ValueError(f"{what}: a capture under jit takes indices or all, not a {self.form}")
        return np.flatnonzero(self.mask(size, what)).astype(np.int32)


ALL = Selection("all")


def is_mask(value: Any) -> bool:
    """Return whether a value is an array of booleans."""
    return hasattr(value, "dtype") and value.dtype == np.bool_


def is_concrete(value: Any) -> bool:
    """Return whether a value is known while a program is traced."""
    return not isinstance(value, jax.core.Tracer)


def as_int32(array: AnyArray) -> Int[AnyArray, ...]:
    """Return integers as int32, clipped to its range, whose limit no axis reaches."""
    if not np.can_cast(array.dtype, np.int32):
        limits, own = np.iinfo(np.int32), np.iinfo(array.dtype)
        array = array.clip(max(limits.min, own.min), limits.max)
    return array.astype(np.int32)


def as_array(value: Any) -> AnyArray:
    """Return a value as a NumPy array, or as a JAX array if it is one or holds traced values."""
    if isinstance(value, jax.Array):
        return value
    if all(is_concrete(leaf) for leaf in jax.tree.leaves(value)):
        return np.asarray(value)
    return jax.numpy.asarray(value)
