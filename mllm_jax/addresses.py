"""Addresses: which layers and units of a site are meant, as data.

`site[layers, units]` makes one; see `Address`. Users reach these names through `mllm_jax.sites`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeAlias

import jax
import numpy as np

from mllm_jax.sites import Namespace, Site, lm
from mllm_jax.typing import AnyArray, Bool, Int

_ABOVE_FEATURE_LAYER = "; layers above the feature layer never reach the LM and do not run"
END = 2**30  # the open end of a slice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """A selection of entries of one axis: all, a range, a list of indices, or a mask.

    Attributes:
      form: "all", "one", "range", "index", "mask" or "pairs". Static.
      value: The data: int32[] for one, int32[3] for a range, int32[n] for indices, bool[n] for a
        mask, int32[n, 2] for pairs of a layer and a unit; None for all.
    """

    form: str = dataclasses.field(metadata={"static": True})
    value: Any = None

    @classmethod
    def parse(cls, item: Any) -> Selection:
        """Return the selection that one part of the brackets after a site means.

        Raises:
          ValueError: A slice has a step below 1.
          TypeError: The part holds neither integers, slices nor masks.
          IndexError: Integers have a shape other than [], [n] or [n, 2].
        """
        if item is None:
            return cls("all")
        if isinstance(item, slice):
            given = item.start, item.stop, item.step
            if all(part is None for part in given):
                return cls("all")
            defaults = zip(given, (0, END, 1), strict=True)
            parts = [default if part is None else part for part, default in defaults]
            if _concrete(parts[2]) and parts[2] < 1:
                raise ValueError(f"slice {item} of an address: the step must be positive")
            return cls("range", as_array(parts).astype(np.int32))
        array = as_array(item)
        if array.dtype == bool:
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
        return cls(("one", "index", "pairs")[array.ndim], array.astype(np.int32))

    def mask(self, size: int, what: str) -> Bool[AnyArray, " size"]:
        """Return the selected entries as a mask.

        Args:
          size: The length of the axis.
          what: The name of the axis in error messages: "lm.mlp.act: layer".

        Raises:
          ValueError: Indices that are known are out of range, or a mask has another length.
        """
        if self.form == "all":
            return np.ones((size,), bool)
        if self.form == "mask":
            if self.value.shape[-1] != size:
                raise ValueError(
                    f"{what} mask has {self.value.shape[-1]} entries, the model has {size}"
                )
            return self.value
        xp = np if _concrete(self.value) else jax.numpy
        if self.form == "range":
            start, stop, step = self.value[0], self.value[1], self.value[2]
            at = xp.arange(size)
            start = xp.maximum(xp.where(start < 0, start + size, start), 0)
            stop = xp.where(stop < 0, stop + size, stop)
            return (at >= start) & (at < stop) & ((at - start) % step == 0)
        return (xp.arange(size)[:, None] == self.entries(size, what)).any(1)

    def entries(self, size: int, what: str) -> Int[AnyArray, " n"]:
        """Return the indices, counted from the start.

        Indices out of range are an error where they are known; where they are traced they become
        `size`, which is no entry.
        """
        xp = np if _concrete(self.value) else jax.numpy
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

    def pairs_mask(self, layers: int, width: int, name: str) -> Bool[AnyArray, "L width"]:
        """Return pairs as a mask."""
        layer = Selection("index", self.value[:, 0]).entries(layers, f"{name}: layer")
        unit = Selection("index", self.value[:, 1]).entries(width, f"{name}: unit")
        if _concrete(self.value):
            mask = np.zeros((layers, width), bool)
            mask[layer, unit] = True
            return mask
        return jax.numpy.zeros((layers, width), bool).at[layer, unit].set(True, mode="drop")

    def indices(self, size: int, what: str) -> Int[AnyArray, " n"]:
        """Return the indices of a selection whose size must be static, as a capture needs it."""
        if self.form == "pairs" or (self.form == "mask" and self.value.ndim > 1):
            raise ValueError(
                f"{what}: a capture takes the same units in every layer, "
                f"not {'pairs' if self.form == 'pairs' else 'a mask'}"
            )
        if self.form in ("index", "one"):
            return self.entries(size, what)
        if not _concrete(self.value):
            raise ValueError(f"{what}: a capture under jit takes indices or all, not a {self.form}")
        return np.flatnonzero(self.mask(size, what)).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Address:
    """A site with a selection of its layers and units.

    `site[layers, units]` means these units in each of these layers, however both are given: one
    index, a slice, a list or a mask. NumPy would read two lists of one length as pairs, so a
    warning says that they are not; `site[np.ix_(layers, units)]` means the same without a warning.
    `site[pairs]` with pairs int[n, 2] of (layer, unit), such as `np.argwhere(mask)`, means one unit
    of one layer each. `site[mask]` takes a mask bool[L, F].

    Attributes:
      site: The site. Static.
      layers: The selected layers.
      units: The selected units; a mask [L, F] and pairs select layers as well.
    """

    site: Site = dataclasses.field(metadata={"static": True})
    layers: Selection = Selection("all")
    units: Selection = Selection("all")

    @classmethod
    def of(cls, target: Target) -> Address:
        """Return the address that a user means.

        Args:
          target: A site, an address, or a mask bool[L, F], which stands for `lm.mlp.act[mask]`.

        Raises:
          TypeError: The target is none of these.
        """
        if isinstance(target, Address):
            return target
        if isinstance(target, Site):
            return cls(target)
        if isinstance(target, Namespace):
            return cls(target._own_site())
        if _is_mask(target):
            return lm.mlp.act[target]
        raise TypeError(
            f"expected a site such as sites.lm.mlp.act, an address or a mask bool[L, F], "
            f"got {type(target).__name__}"
        )

    @classmethod
    def parse(cls, site: Site, item: Any) -> Address:
        """Return the address that the brackets after a site mean.

        Raises:
          IndexError: The brackets have too many parts, or a part that the site does not allow.
          TypeError: A part holds neither integers, slices nor masks.
          ValueError: A slice has a step below 1.
        """
        parts = item if isinstance(item, tuple) else (item,)
        site.check_parts(len(parts))
        if not site.stacked:
            units = Selection.parse(parts[0])
            if units.form == "pairs":
                raise IndexError(f"{site} exists once, not per layer: it has no pairs of a layer")
            return cls(site, units=units)
        parts = tuple(p if p is None or isinstance(p, slice) else as_array(p) for p in parts)
        first, shapes = parts[0], [tuple(getattr(part, "shape", ())) for part in parts]
        if _is_mask(first) and first.ndim == 2:
            if len(parts) > 1:
                raise IndexError(f"{site}[mask] with a mask bool[L, F] takes no second part")
            return cls(site, units=Selection("mask", first))
        if list(map(len, shapes)) == [2, 2] and shapes[0][1] == shapes[1][0] == 1:  # np.ix_
            return cls(site, *(Selection.parse(part.reshape(-1)) for part in parts))
        selections = [Selection.parse(part) for part in parts]
        if selections[0].form == "pairs" and len(parts) == 1:
            return cls(site, units=selections[0])
        _check_two_lists(site, selections)
        return cls(site, *selections)

    def mask(self, layers: int, width: int) -> Bool[AnyArray, "L width"]:
        """Return a mask [L, width], or [L, 1] for all units; of NumPy where the address is known.

        Args:
          layers: How many layers the site has.
          width: How many units a layer has.

        Raises:
          ValueError: An index is out of range, or a mask has another shape.
        """
        name = self.site.name
        units = self.units
        rows = self.layers.mask(layers, f"{name}: layer")[:, None]
        if units.form == "mask" and units.value.ndim == 2:
            if tuple(units.value.shape) != (layers, width):
                raise ValueError(
                    f"{name}: the mask is {tuple(units.value.shape)}, "
                    f"the model has {layers} layers of {width}"
                )
            return rows & units.value
        if units.form == "all":
            return rows
        if units.form == "pairs":
            return rows & units.pairs_mask(layers, width, name)
        return rows & units.mask(width, f"{name}: unit")[None, :]


# What a user may give as the target of an edit or capture: `Address.of` reads it.
Target: TypeAlias = "Site | Address | Namespace | AnyArray"


def _check_two_lists(site: Site, selections: list[Selection]) -> None:
    if any(selection.form == "pairs" for selection in selections):
        raise IndexError(f"{site}[pairs] with pairs int[n, 2] stands alone in the brackets")
    lengths = [len(s.value) for s in selections if s.form == "index"]
    if len(lengths) == 2 and lengths[0] == lengths[1] > 1:
        warnings.warn(
            f"{site}[layers, units] with two lists of {lengths[0]} means each unit in each layer: "
            f"write {site}[np.ix_(layers, units)] to say so, or {site}[[(layer, unit), ...]] for "
            "pairs",
            stacklevel=4,
        )


def _is_mask(value: Any) -> bool:
    return hasattr(value, "dtype") and value.dtype == np.bool_


def _concrete(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)


def as_array(value: Any) -> AnyArray:
    """Return a value as an array of NumPy, or of JAX if it is one or holds traced values."""
    if isinstance(value, jax.Array):
        return value
    if all(_concrete(leaf) for leaf in jax.tree.leaves(value)):
        return np.asarray(value)
    return jax.numpy.asarray(value)
