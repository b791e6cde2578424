"""Edits: what to change in a forward pass, as a pytree.

The kind and the site of an edit are structure; layers, neurons, tokens and values are arrays,
so changing them never recompiles. Before an edit meets the program it is bound: its address
becomes a mask over layers and units, its selector a mask over tokens, its values get a leading
layer axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites, tokens
from mllm_jax.sites import Address


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """One change, as the user says it.

    Attributes:
      kind: a name of KINDS. Static.
      address: the site, its layers and units.
      where: which tokens.
      values: arrays by name, in the shapes that `KINDS` allows.
      fn: the function of a `call`. Static.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    values: dict[str, Any]
    fn: Callable | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """Edits in the order in which they apply at each site. Compose with >>."""

    items: tuple[Edit, ...] = ()

    def __rshift__(self, other: Edits) -> Edits:
        return Edits(self.items + other.items)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def _one(kind: str, target, where, fn=None, **values) -> Edits:
    address = Address.of(target)
    return Edits((Edit(kind, address, tokens.of(where), values, fn),))


def ablate(target, *, where=None) -> Edits:
    """Set to zero.

    Args:
      target: a site, an address, or a mask bool[L, F] of `lm.mlp.act`.
      where: a token selector or a mask bool[B, T]; all tokens by default.
    """
    return _one("ablate", target, where)


def scale(target, by, *, where=None) -> Edits:
    """Multiply: `by` is a scalar, or [F], [L, F], [B, T, F], [L, B, T, F] (1 where it repeats)."""
    return _one("scale", target, where, value=by)


def add(target, value, *, where=None) -> Edits:
    """Add a vector (steering); shapes as in `scale`."""
    return _one("add", target, where, value=value)


def replace(target, value, *, where=None) -> Edits:
    """Set to a value, such as a mean; shapes as in `scale`."""
    return _one("replace", target, where, value=value)


def project_out(target, basis, *, where=None) -> Edits:
    """Remove a subspace: x - x U U^T with U an orthonormal basis of the columns given.

    Args:
      basis: [D] or [D, r] directions, not necessarily orthonormal.
    """
    return _one("project_out", target, where, basis=basis)


def _project_out(x, basis):
    return x - jnp.einsum("...D,Dr,dr->...d", x, basis, basis)


KINDS: dict[str, Callable] = {
    "ablate": lambda x: jnp.zeros_like(x),
    "scale": lambda x, value: x * value,
    "add": lambda x, value: x + value,
    "replace": lambda x, value: jnp.broadcast_to(value, x.shape),
    "project_out": _project_out,
}


@dataclasses.dataclass(frozen=True)
class SiteShape:
    """A site in a model: how many layers have it, and its shape and dtype in one layer."""

    layers: int
    shape: tuple[int, ...]
    dtype: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundEdit:
    """An edit in the shapes of a model and a batch.

    Attributes:
      kind, site, fn: structure.
      units: bool[L, F], or bool[L, 1] for all units; L is 1 where a site is not per layer.
      tokens: bool[B, T].
      values: arrays with a leading L axis and then the rank of the site.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    fn: Callable | None = dataclasses.field(metadata={"static": True})
    units: Any
    tokens: Any
    values: dict[str, Any]

    def apply(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x, changed where the mask is True. The values are those of one layer."""
        new = KINDS[self.kind](x, **self.values) if self.fn is None else self.fn(x, **self.values)
        return jnp.where(mask, new.astype(x.dtype), x)


def bind(
    edits: Edits | None, shapes: dict[str, SiteShape], maps: dict[str, tokens.TokenMap]
) -> tuple[BoundEdit, ...]:
    """Edits in the shapes of a model and a batch. Stays in NumPy where the inputs are known.

    Args:
      shapes: the sites that this pass runs through.
      maps: the token map of each module.

    Raises:
      ValueError: a site this pass does not have, a layer or unit out of range, a mask or value
        of the wrong shape, or an edit that selects nothing.
    """
    return tuple(_bind(edit, shapes, maps) for edit in edits or ())


def look_up(site: sites.Site, shapes: dict[str, SiteShape]) -> SiteShape:
    if site.name not in shapes:
        raise ValueError(f"this pass has no site {site.name}; it has: {', '.join(shapes)}")
    return shapes[site.name]


def unit_axis(site: sites.Site) -> int:
    """Which axis of the site its units are on: the first that is neither rows nor tokens."""
    return next(i for i, axis in enumerate(site.axes) if axis not in "BITPS")


def token_axis(site: sites.Site) -> int:
    return next(i for i, axis in enumerate(site.axes) if axis in "TP")


def _bind(edit: Edit, shapes, maps) -> BoundEdit:
    site = edit.address.site
    spec = look_up(site, shapes)
    units = edit.address.mask(spec.layers, spec.shape[unit_axis(site)])
    where = edit.where.mask(maps[site.module])
    _refuse_nothing(site, units, where)
    values = {
        name: _value(name, value, edit.address, spec) for name, value in edit.values.items()
    }
    return BoundEdit(edit.kind, site, edit.fn, units, where, values)


def _refuse_nothing(site, units, where) -> None:
    if isinstance(units, np.ndarray) and not units.any():
        raise ValueError(f"the edit of {site.name} selects no layer or unit: nothing would change")
    if isinstance(where, jax.core.Tracer):
        return
    if not np.asarray(where).any():
        raise ValueError(f"the edit of {site.name} selects no token of this batch (see where=)")


def _value(name: str, value, address: Address, spec: SiteShape):
    """A value with a leading L axis and then the rank of the site."""
    rank = len(spec.shape)
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    array = array.astype(spec.dtype)
    if name == "basis":
        return _per_layer(_orthonormal(array, spec, address.site), spec.layers)
    array = _scatter_units(array, address, spec)
    if array.ndim == 2 and rank > 2:  # [L, F]
        array = array.reshape(array.shape[0], *(1,) * (rank - 2), array.shape[1])
    elif array.ndim <= rank:  # a scalar, [F] or [B, T, F]
        array = array.reshape(1, *(1,) * (rank - array.ndim), *array.shape)
    want = (spec.layers, *spec.shape)
    if array.ndim != len(want) or any(n not in (1, m) for n, m in zip(array.shape, want)):
        raise ValueError(
            f"{address.site.name}: a value of shape {np.shape(value)} does not fit; the site is "
            f"[{' '.join(('L', *address.site.axes))}] = {list(want)}"
        )
    return _per_layer(array, spec.layers)


def _per_layer(array, layers: int):
    if array.shape[0] == layers:
        return array
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.broadcast_to(array, (layers, *array.shape[1:]))


def _scatter_units(array, address: Address, spec: SiteShape):
    """Values given for the chosen neurons alone, put in their places along the last axis."""
    chosen = address.units
    width = spec.shape[-1]
    if chosen.form != "index" or array.ndim == 0 or array.shape[-1] == width:
        return array
    if array.shape[-1] != chosen.value.shape[0]:
        return array  # refused below, with the shapes
    xp = np if isinstance(array, np.ndarray) and isinstance(chosen.value, np.ndarray) else jnp
    full = jnp.zeros((*array.shape[:-1], width), array.dtype).at[..., chosen.value].set(array)
    return np.asarray(full) if xp is np else full


def _orthonormal(basis, spec: SiteShape, site: sites.Site):
    basis = basis[:, None] if basis.ndim == 1 else basis
    if basis.ndim != 2 or basis.shape[0] != spec.shape[-1]:
        raise ValueError(
            f"{site.name}: the basis is {basis.shape}, expected [{spec.shape[-1]}, directions]"
        )
    xp = np if isinstance(basis, np.ndarray) else jnp
    return xp.linalg.qr(basis)[0][None]
