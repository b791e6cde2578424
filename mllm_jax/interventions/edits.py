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

from mllm_jax import notebook, precision, sites, tokens
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
      route: of a patch: the rows that are read and the rows that are written.
      on: of a knockout: the keys that are hidden.
      strengths: float[steps], by step of generation; see `per_step`.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    values: dict[str, Any]
    fn: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    route: tuple[Any, Any] | None = None
    on: tokens.Where | None = None
    strengths: Any = None


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

    def _repr_html_(self) -> str:
        return notebook.edits(self)


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
    """Multiply by a value.

    Args:
      by: a scalar, one value a unit [F] or [L, F], or with all axes of the site [B, T, F] or
        [L, B, T, F]; 1 where it repeats. At `lm.attn.heads`, where a unit is a head, that is
        [N], [L, N], [N, H], [L, N, H], [B, T, N, H] or [L, B, T, N, H]. Where units are listed,
        `act[12, [7, 3]]`, as many values as are listed follow the list. In generation a token
        that is said takes the value at the last token of its row's prompt.
    """
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
      source, into: rows of the batch; lists of rows for several pairs, which all read what was
        there before the patch.
      basis: [D] or [D, r]: only this subspace is exchanged (interchange, DAS); all by default.
    """
    values = {} if basis is None else {"basis": basis}
    route = tuple(sites.as_array(rows).astype(np.int32) for rows in (source, into))
    return _one("patch", target, where, values, route=route)


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


def per_step(edits: Edits, strengths) -> Edits:
    """Edits whose effect has its own strength at each step of generation: x + s (edit(x) - x).

    Step 0 reads the prompt, step i the i-th token of the answer; a pass over prompt and answer
    means the same. After the last strength given, that one holds on.

    Args:
      strengths: float[steps]: 0 leaves x as it is, 1 is the edit.
    """
    strengths = sites.as_array(strengths)
    if strengths.ndim != 1 or not len(strengths):
        raise ValueError(f"per_step takes strengths [steps], got shape {strengths.shape}")
    for edit in edits:
        if edit.kind == "knockout":
            raise ValueError("a knockout is a boolean mask, which has no strength for per_step")
        if edit.strengths is not None:
            raise ValueError(f"the {edit.kind} of {edit.address.site} has strengths already")
    return Edits(tuple(dataclasses.replace(edit, strengths=strengths) for edit in edits))


def _project_out(x, basis):
    return x - _onto(x, basis)


def _onto(x, basis):
    """The part of x within the span of orthonormal columns, in float32 or better."""
    inside = precision.einsum("...D,Dr->...r", precision.at_least_float32(x), basis)
    return precision.einsum("...r,Dr->...D", inside, basis)


def _patch(x, basis=None, *, row, at):
    read = x[row, at]
    if basis is None:
        return read
    return x + _onto(precision.at_least_float32(read) - x, basis)


KINDS: dict[str, Callable] = {
    "ablate": lambda x: jnp.zeros_like(x),
    "scale": lambda x, value: x * value,
    "add": lambda x, value: x + value,
    "replace": lambda x, value: jnp.broadcast_to(value, x.shape),
    "project_out": _project_out,
    "patch": _patch,
    "knockout": lambda x, *, hidden: x & ~hidden[:, None, None, :],
}


SUBSPACES = ("project_out", "patch")  # kinds whose value is a basis


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
      along: arrays [B, T] that follow the tokens: what a patch reads, what a knockout hides,
        the strength of any edit.
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
        along = dict(self.along)
        strength = along.pop("strength", None)
        new = (self.fn or KINDS[self.kind])(x, **self.values, **along)
        if strength is not None:
            new = x + strength * (new - x)
        return jnp.where(mask, new.astype(x.dtype), x)


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


def look_up(site: sites.Site, shapes: dict[str, SiteShape]) -> SiteShape:
    if site.name not in shapes:
        raise ValueError(f"this pass has no site {site.name}; it has: {', '.join(shapes)}")
    return shapes[site.name]


def unit_axis(site: sites.Site) -> int:
    """Which axis of the site its units are on: the first that is neither rows nor tokens."""
    return next(i for i, axis in enumerate(site.axes) if axis not in "BITPSQ")


def token_axis(site: sites.Site) -> int:
    return next(i for i, axis in enumerate(site.axes) if axis in "TPQ")


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
    """[L, D, r], orthonormal columns that span those given."""
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
