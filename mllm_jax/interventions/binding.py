"""Binding: edits in the shapes of a model and a batch.

An address becomes a mask over layers and units, a selector a mask over tokens, and values get a
leading layer axis. What is known before the program runs stays in NumPy, where it can be refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites, tokens
from mllm_jax.interventions.edits import (
    SUBSPACES,
    BoundEdit,
    Edit,
    Edits,
    SiteShape,
    look_up,
    unit_axis,
)
from mllm_jax.numerics import precision
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
        where, along = _route(site, where, map_.readers, *edit.route)
    if edit.on is not None:
        along = {"hidden": edit.on.mask(map_)}
        _refuse_nothing(site, units, along["hidden"])
    if edit.strengths is not None:
        step = map_.step.clip(0, len(edit.strengths) - 1)
        known = isinstance(step, np.ndarray) and isinstance(edit.strengths, np.ndarray)
        along["strength"] = (np if known else jnp).take(edit.strengths, step).astype(spec.dtype)
    return BoundEdit(edit.kind, site, edit.fn, units, where, values, along)


def _route(site, where, readers, source, into):
    """Where a patch writes, bool[B, T], and what it reads there, int32[B, T] each: row and token.

    At a site of tiles B is tiles, and the tokens of a row are those of the tiles that it reads, one
    tile after the other. What cannot be patched is an error where it is known, and otherwise not
    written: rows that are not there, that have different numbers of selected tokens or that are
    written twice, and tiles that another row reads as well.

    Args:
      where: bool[B, T], the selected tokens.
      readers: bool[rows, B] of a site of tiles, None where B is rows.
    """
    B, T = where.shape
    readers = np.eye(B, dtype=bool) if readers is None else readers
    arrays = where, readers, source, into
    known = not any(isinstance(array, jax.core.Tracer) for array in arrays)
    xp = np if known else jnp
    where, readers, source, into = map(xp.asarray, arrays)
    source, into = xp.broadcast_arrays(*map(xp.atleast_1d, (source, into)))

    def of_pairs(rows):
        """bool[pairs, rows], which row it is, and bool[pairs, B], which tiles it reads."""
        here = rows[:, None] == xp.arange(len(readers))
        return here, (here[:, :, None] & readers).any(1)

    (_, read), (here, written) = of_pairs(source), of_pairs(into)
    others = (~here[:, :, None] & readers).any(1)
    shared = (written & others & where.any(1)).any(1)
    read, written = ((tiles[:, :, None] & where).reshape(-1, B * T) for tiles in (read, written))
    counts = read.sum(1), written.sum(1)
    if known:
        _refuse_route(site, len(readers), source, into, counts, shared)
    once = (into[:, None] == into).sum(1) == 1
    written = written & (once & ~shared & (counts[0] == counts[1]))[:, None]
    # The tokens that are read first; of the n-th that is written, the n-th of these.
    order = xp.argsort(~read, axis=1, stable=True)
    at = xp.take_along_axis(order, xp.maximum(xp.cumsum(written, 1) - 1, 0), 1)
    at = xp.where(written, at, 0).sum(0).reshape(B, T)  # one pair at most writes a token
    along = {"row": (at // T).astype(xp.int32), "at": (at % T).astype(xp.int32)}
    return written.any(0).reshape(B, T), along


def _refuse_route(site, rows: int, source, into, counts, shared) -> None:
    if len(set(into.tolist())) < len(into):
        raise ValueError(f"the patch of {site.name} writes a row twice: {into.tolist()}")
    for a, b, read, written, also in zip(source, into, *counts, shared, strict=True):
        if not (0 <= a < rows and 0 <= b < rows):
            raise ValueError(
                f"the patch of {site.name} reads row {a} and writes row {b}: "
                f"the batch has rows 0 to {rows - 1}"
            )
        if read != written or not read:
            raise ValueError(
                f"the patch of {site.name} matches {read} tokens of row {a} with {written} "
                f"of row {b}: they must be as many, and some"
            )
        if also:
            raise ValueError(
                f"the patch of {site.name} writes the pictures of row {b}, which another row of "
                "the batch shares: make each its own with model.unshared(batch)"
            )


def _refuse_nothing(site, units, where) -> None:
    if not isinstance(units, jax.core.Tracer) and not np.asarray(units).any():
        raise ValueError(f"the edit of {site.name} selects no layer or unit: nothing would change")
    if not isinstance(where, jax.core.Tracer) and not np.asarray(where).any():
        raise ValueError(f"the edit of {site.name} selects no token of this batch (see where=)")


def refuse_uncomputed(items: Iterable[Any], last: Any, prompt: int) -> None:
    """An edit or capture of logits whose tokens are not computed, as far as that is known.

    A pass for the last token computes the logits of that, and of those which follow the prompt.

    Args:
      items: bound edits and captures.
      last: int32[B], where each row's prompt ends. prompt: how many tokens prompts have.
    """
    for item in items:
        along = getattr(item, "along", {})
        arrays = item.tokens, last, *(along[name] for name in ("row", "at") if name in along)
        if item.site != sites.logits or any(isinstance(a, jax.core.Tracer) for a in arrays):
            continue
        tokens_, last_, *route = map(np.asarray, arrays)
        at = np.arange(tokens_.shape[1])
        after = (at >= prompt) & (at < len(at) - 1)  # of the last of all nothing is asked
        reached = tokens_ & ((at == last_[:, None]) | after)
        if not reached.any():
            raise ValueError(
                "this pass computes the logits of each row's last token alone, and what is asked "
                'of them is of other tokens: use where=tok.last, or run(..., logits="all")'
            )
        if route:
            row, read = route
            _refuse_unread(reached & (read != np.where(at < prompt, last_[row], at)), row, read)


def _refuse_unread(wrong, row, read) -> None:
    if wrong.any():
        to, at = np.argwhere(wrong)[0]
        raise ValueError(
            f"the patch of logits matches token {at} of row {to} with token {read[to, at]} of row "
            f"{row[to, at]}, whose logits this pass does not compute: use where=tok.last, or "
            'run(..., logits="all")'
        )


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
    basis = basis.astype(precision.at_least_float32_dtype(spec.dtype))
    columns = np.linalg.qr(basis)[0] if xp is np else precision.orthonormalize(basis)
    return _per_layer(columns[None], spec.layers)
