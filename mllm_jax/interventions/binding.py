"""Binding: edits in the shapes of a model and a batch.

An address becomes a mask over layers and units, a selector a mask over tokens, and values get a
leading layer axis. What is known before the program runs stays in NumPy, where it can be refused.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import precision, sites, tokens
from mllm_jax.interventions.edits import (
    SUBSPACES,
    BoundEdit,
    Edit,
    Edits,
    SiteShape,
    look_up,
    unit_axis,
)
from mllm_jax.sites import Address


def bind(
    edits: Edits | None, shapes: dict[str, SiteShape], maps: dict[str, tokens.TokenMap]
) -> tuple[BoundEdit, ...]:
    """Edits in the shapes of a model and a batch. Stays in NumPy where the inputs are known.

    Args:
      shapes: the sites that this pass runs through.
      maps: the token map of each module, and of sites that have one of their own.

    Raises:
      ValueError: a site this pass does not have, a layer or unit out of range, a mask or value
        of the wrong shape, or an edit that selects nothing.
    """
    return tuple(_bind(edit, shapes, maps) for edit in edits or ())


def _bind(edit: Edit, shapes, maps) -> BoundEdit:
    site = edit.address.site
    spec = look_up(site, shapes)
    units = edit.address.mask(spec.layers, spec.shape[unit_axis(site)])
    map_ = site.entry(maps)
    where = edit.where.mask(map_)
    _refuse_nothing(site, units, where)
    fit = _value if edit.kind not in SUBSPACES else _basis
    values = {
        name: fit(sites.as_array(value), edit.address, spec) for name, value in edit.values.items()
    }
    along = {}
    if edit.route is not None:
        where, along = _route(site, where, *edit.route)
    if edit.on is not None:
        along = {"hidden": edit.on.mask(map_)}
        _refuse_nothing(site, units, along["hidden"])
    if edit.strengths is not None:
        step = map_.step.clip(0, len(edit.strengths) - 1)
        known = isinstance(step, np.ndarray) and isinstance(edit.strengths, np.ndarray)
        along["strength"] = (np if known else jnp).take(edit.strengths, step).astype(spec.dtype)
    return BoundEdit(edit.kind, site, edit.fn, units, where, values, along)


def _route(site, where, source, into):
    """Where a patch writes, bool[B, T], and which row and token is read there, int32[B, T]."""
    arrays = (where, source, into)
    xp = np if all(isinstance(array, (np.ndarray, np.generic)) for array in arrays) else jnp
    source, into = xp.broadcast_arrays(*map(xp.atleast_1d, (source, into)))
    if xp is np:
        _refuse_route(site, where, source, into)
    rows = len(where)
    # by row: which one is read, and its selected tokens first
    read = (into == xp.arange(rows)[:, None]) @ source
    order = xp.argsort(~where[read], axis=1, stable=True)
    at = xp.take_along_axis(order, xp.maximum(xp.cumsum(where, 1) - 1, 0), 1)
    written = where & (xp.arange(rows)[:, None] == into).any(1, keepdims=True)
    return written, {
        "row": xp.broadcast_to(read[:, None], where.shape).astype(xp.int32),
        "at": at.astype(xp.int32),
    }


def _refuse_route(site, where, source, into) -> None:
    rows, counts = len(where), where.sum(1)
    if len(set(into.tolist())) < len(into):
        raise ValueError(f"the patch of {site.name} writes a row twice: {into.tolist()}")
    for a, b in zip(source, into, strict=True):
        if not (0 <= a < rows and 0 <= b < rows):
            raise ValueError(
                f"the patch of {site.name} reads row {a} and writes row {b}: "
                f"the batch has rows 0 to {rows - 1}"
            )
        if counts[a] != counts[b] or not counts[a]:
            raise ValueError(
                f"the patch of {site.name} matches {counts[a]} tokens of row {a} with {counts[b]} "
                f"of row {b}: they must be as many, and some"
            )


def _refuse_nothing(site, units, where) -> None:
    if isinstance(units, np.ndarray) and not units.any():
        raise ValueError(f"the edit of {site.name} selects no layer or unit: nothing would change")
    if isinstance(where, jax.core.Tracer):
        return
    if not np.asarray(where).any():
        raise ValueError(f"the edit of {site.name} selects no token of this batch (see where=)")


def _value(value, address: Address, spec: SiteShape):
    """A value with a leading L axis and then the rank of the site."""
    shape = _reading(value.shape, address, spec)
    full = value.astype(spec.dtype).reshape(shape)
    if value.ndim:  # a scalar stays one, however many units are listed
        full = _scatter_units(full, address, spec)
    return _per_layer(full, spec.layers)


def _reading(given: tuple[int, ...], address: Address, spec: SiteShape) -> tuple[int, ...]:
    """The shape of a value with all axes of the site, 1 where it repeats.

    Which axes were given is told by their number and lengths; there must be one way to read them.
    """
    site = address.site
    letters, full = ("L", *site.axes), (spec.layers, *spec.shape)
    unit, every = 1 + unit_axis(site), tuple(range(len(full)))
    forms = ((), (unit,), (0, unit), every[unit:], (0, *every[unit:]), every[1:], every)

    def fits(n: int, axis: int) -> bool:
        return n in (1, full[axis]) or (axis == unit and n == _listed(address))

    readings = {}
    for axes in forms:
        if len(axes) == len(given) and all(map(fits, given, axes)):
            lengths = dict(zip(axes, given, strict=True))
            readings[tuple(lengths.get(axis, 1) for axis in every)] = axes
    if not readings:
        raise ValueError(
            f"{site.name}: a value of shape {given} does not fit; the site is "
            f"[{' '.join(letters)}] = {list(full)}"
        )
    if len(readings) > 1:
        names = " or ".join(f"[{' '.join(letters[a] for a in axes)}]" for axes in readings.values())
        raise ValueError(
            f"{site.name}: a value of shape {given} may be {names}; write it with all axes of "
            f"[{' '.join(letters)}]: {' or '.join(str(list(shape)) for shape in readings)}"
        )
    return next(iter(readings))


def _listed(address: Address) -> int | None:
    """How many units the address lists, if it does."""
    return len(address.units.value) if address.units.form == "index" else None


def _per_layer(array, layers: int):
    if array.shape[0] == layers:
        return array
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.broadcast_to(array, (layers, *array.shape[1:]))


def _scatter_units(value, address: Address, spec: SiteShape):
    """Values given for the listed units alone, put in the places of these units."""
    axis = 1 + unit_axis(address.site)
    if value.shape[axis] != _listed(address):
        return value
    units = address.units.value
    shape = tuple(spec.shape[axis - 1] if i == axis else n for i, n in enumerate(value.shape))
    at = (*(slice(None),) * axis, units)
    if isinstance(value, jax.Array) or isinstance(units, jax.Array):
        return jnp.zeros(shape, value.dtype).at[at].set(value)
    full = np.zeros(shape, value.dtype)
    full[at] = value
    return full


def _basis(basis, address: Address, spec: SiteShape):
    """[L, D, r], orthonormal columns that span those given, in float32 or better."""
    site = address.site
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
    basis = basis.astype(precision.wide(spec.dtype))
    columns = np.linalg.qr(basis)[0] if xp is np else precision.orthonormal(basis)
    return _per_layer(columns[None], spec.layers)
