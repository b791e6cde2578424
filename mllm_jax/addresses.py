"""Addresses: the selected layers and units of a site, as data.

`site[layers, units]` makes one; see `Address`. Users reach these names through `mllm_jax.sites`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeAlias

import jax

from mllm_jax import notebook
from mllm_jax.selections import ALL, Selection, as_array, is_mask
from mllm_jax.sites import Namespace, Site, lm
from mllm_jax.typing import AnyArray, Bool


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
    layers: Selection = ALL
    units: Selection = ALL

    @classmethod
    def of(cls, target: Target) -> Address:
        """Return the address of a target.

        Args:
          target: A site, an address, or a mask bool[L, F], which stands for `lm.mlp.act[mask]`.

        Raises:
          TypeError: The target is not one of these.
        """
        if isinstance(target, Address):
            return target
        if isinstance(target, Site):
            return cls(target)
        if isinstance(target, Namespace):
            return cls(target._own_site())
        if is_mask(target):
            return lm.mlp.act[target]
        raise TypeError(
            f"expected a site such as sites.lm.mlp.act, an address or a mask bool[L, F], "
            f"got {type(target).__name__}"
        )

    @classmethod
    def parse(cls, site: Site, item: Any) -> Address:
        """Return the address for the brackets after a site.

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
                raise IndexError(f"{site} exists once, not per layer: index it without pairs")
            return cls(site, units=units)
        parts = tuple(p if p is None or isinstance(p, slice) else as_array(p) for p in parts)
        first, shapes = parts[0], [tuple(getattr(part, "shape", ())) for part in parts]
        if is_mask(first) and first.ndim == 2:
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
          layers: The number of layers of the site, L.
          width: The number of units of a layer.

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

    def _repr_html_(self) -> str:
        return notebook.target(self)


# Values that a user may give as the target of an edit or capture; `Address.of` converts them.
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
