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
      values: arrays by name, in the shapes that the kind allows.
      fn: the function of a `call`. Static.
      route: of a patch: the row that is read and the row that is written.
      on: of a knockout: the keys that are hidden.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    values: dict[str, Any]
    fn: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    route: tuple[Any, Any] | None = None
    on: tokens.Where | None = None


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


def _one(kind: str, target, where, values=None, **how) -> Edits:
    address = Address.of(target)
    if (kind == "knockout") != (address.site == sites.lm.attn.mask):
        raise ValueError(f"{kind} does not apply to {address.site}: only lm.attn takes knockout")
    if kind == "patch" and address.site == sites.lm.attn.pattern:
        raise ValueError(
            "patch does not apply to lm.attn.pattern: the keys of two rows do not correspond; "
            "patch lm.attn.heads"
        )
    return Edits((Edit(kind, address, tokens.of(where), values or {}, **how),))


def ablate(target, *, where=None) -> Edits:
    """Set to zero.

    Args:
      target: a site, an address, or a mask bool[L, F] of `lm.mlp.act`.
      where: a token selector or a mask bool[B, T]; all tokens by default.
    """
    return _one("ablate", target, where)


def scale(target, by, *, where=None) -> Edits:
    """Multiply: `by` is a scalar, or [F], [L, F], [B, T, F], [L, B, T, F] (1 where it repeats)."""
    return _one("scale", target, where, {"value": by})


def add(target, value, *, where=None) -> Edits:
    """Add a vector (steering); shapes as in `scale`."""
    return _one("add", target, where, {"value": value})


def replace(target, value, *, where=None) -> Edits:
    """Set to a value, such as a mean; shapes as in `scale`."""
    return _one("replace", target, where, {"value": value})


def project_out(target, basis, *, where=None) -> Edits:
    """Remove a subspace: x - x U U^T with U an orthonormal basis of the columns given.

    Args:
      basis: [D] or [D, r] directions, not necessarily orthonormal.
    """
    return _one("project_out", target, where, {"basis": basis})


def patch(target, source, into, *, where=None, basis=None) -> Edits:
    """Row `into` reads row `source` of the same batch: activation patching without a stored cache.

    The selected tokens of both rows are matched in order, so rows may differ in length.

    Args:
      source, into: rows of the batch.
      basis: [D] or [D, r]: only this subspace is exchanged (interchange, DAS); all by default.
    """
    values = {} if basis is None else {"basis": basis}
    return _one("patch", target, where, values, route=(np.int32(source), np.int32(into)))


def knockout(target, *, to=None, on=None) -> Edits:
    """Hide keys from queries, in the boolean attention mask.

    Args:
      target: `sites.lm.attn`, or layers and heads of it: `sites.lm.attn[10:, [0, 3]]`.
      to: the tokens that look. on: the tokens that they no longer see.
    """
    return _one("knockout", target, to, on=tokens.of(on))


def call(target, fn: Callable, *, where=None, **arrays) -> Edits:
    """What none of the others says: fn(x, **arrays) -> x at the site.

    Args:
      fn: pure, of jax.numpy; one function is one program, so make it once and pass what varies.
      arrays: in the shapes of `scale`, then given to fn with the rank of the site.
    """
    return _one("call", target, where, arrays, fn=fn)


def _project_out(x, basis):
    return x - _onto(x, basis)


def _onto(x, basis):
    """The part of x within the span of orthonormal columns."""
    return jnp.einsum("...D,Dr,dr->...d", x, basis, basis)


def _patch(x, basis=None, *, row, at):
    read = x[row, at]
    return read if basis is None else x + _onto(read - x, basis)


KINDS: dict[str, Callable] = {
    "ablate": lambda x: jnp.zeros_like(x),
    "scale": lambda x, value: x * value,
    "add": lambda x, value: x + value,
    "replace": lambda x, value: jnp.broadcast_to(value, x.shape),
    "project_out": _project_out,
    "patch": _patch,
    "knockout": lambda x, *, hidden: x & ~hidden[:, None, None, :],
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
      along: arrays [B, T] that follow the tokens: what a patch reads, what a knockout hides.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    fn: Callable | None = dataclasses.field(metadata={"static": True})
    units: Any
    tokens: Any
    values: dict[str, Any]
    along: dict[str, Any]

    def apply(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x, changed where the mask is True. The values are those of one layer."""
        new = (self.fn or KINDS[self.kind])(x, **self.values, **self.along)
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
    values = {name: _value(name, value, edit.address, spec) for name, value in edit.values.items()}
    along = {}
    if edit.route is not None:
        where, along = _route(site, where, *edit.route)
    if edit.on is not None:
        along = {"hidden": edit.on.mask(maps[site.module])}
        _refuse_nothing(site, units, along["hidden"])
    return BoundEdit(edit.kind, site, edit.fn, units, where, values, along)


def _route(site, where, source, into):
    """Where a patch writes, bool[B, T], and which row and token is read there, int32[B, T]."""
    xp = np if isinstance(where, np.ndarray) and isinstance(into, np.generic) else jnp
    rows, _ = where.shape
    if xp is np:
        if not (0 <= source < rows and 0 <= into < rows):
            raise ValueError(
                f"the patch of {site.name} reads row {source} and writes row {into}: "
                f"the batch has rows 0 to {rows - 1}"
            )
        n, m = int(where[source].sum()), int(where[into].sum())
        if n != m or not n:
            raise ValueError(
                f"the patch of {site.name} matches {n} tokens of row {source} with {m} of row "
                f"{into}: they must be as many, and some"
            )
    order = xp.argsort(~where[source], stable=True)
    at = order[xp.maximum(xp.cumsum(where[into]) - 1, 0)]
    written = where & (xp.arange(rows) == into)[:, None]
    shape = where.shape
    return written, {
        "row": xp.broadcast_to(xp.asarray(source, xp.int32), shape),
        "at": xp.broadcast_to(at.astype(xp.int32), shape),
    }


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
    if name == "basis":
        return _per_layer(_orthonormal(array, spec, address.site), spec.layers)
    array = _scatter_units(array.astype(spec.dtype), address, spec)
    after = rank - 1 - unit_axis(address.site)
    if after and 0 < array.ndim <= 2 and array.shape[-1] == spec.shape[-1 - after]:
        array = array.reshape(*array.shape, *(1,) * after)  # one value a head
        array = array if array.ndim > 1 + after else array[None]
    if array.ndim == 2 + after and rank > 2:  # [L, F]
        array = array.reshape(array.shape[0], *(1,) * (rank - 1 - after), *array.shape[1:])
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
    """Values given for the chosen units alone, put in the places of these units."""
    chosen = address.units
    width = spec.shape[unit_axis(address.site)]
    if chosen.form != "index" or array.ndim == 0 or array.shape[-1] == width:
        return array
    if array.shape[-1] != chosen.value.shape[0]:
        return array  # refused below, with the shapes
    shape = (*array.shape[:-1], width)
    if isinstance(array, jax.Array) or isinstance(chosen.value, jax.Array):
        return jnp.zeros(shape, array.dtype).at[..., chosen.value].set(array)
    full = np.zeros(shape, array.dtype)
    full[..., chosen.value] = array
    return full


def _orthonormal(basis, spec: SiteShape, site: sites.Site):
    basis = basis[:, None] if basis.ndim == 1 else basis
    if basis.ndim != 2 or basis.shape[0] != spec.shape[-1]:
        raise ValueError(
            f"{site.name}: the basis is {basis.shape}, expected [{spec.shape[-1]}, directions]"
        )
    xp = np if isinstance(basis, np.ndarray) else jnp
    if xp is np and (rank := np.linalg.matrix_rank(basis)) < basis.shape[1]:
        raise ValueError(
            f"{site.name}: the {basis.shape[1]} directions of the basis span only {rank}"
        )
    return xp.linalg.qr(basis.astype(np.float32))[0][None].astype(spec.dtype)
