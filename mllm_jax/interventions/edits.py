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

from mllm_jax import notebook, sites, tokens
from mllm_jax.numerics import precision
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

    The selected tokens of both rows are matched in order, so rows may differ in length. At a site
    of vision, Q-Former or projector they are those of all tiles of a row's pictures, in order, and
    rows that share a picture are read apart: no other row changes. Inside `jax.jit` over the batch
    that cannot be seen in time: there a row whose pictures are shared is not written.

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
    """Edits with their own strength s at each step of generation: (1 - s) x + s edit(x).

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
            new = (1 - strength) * x + strength * new
        return jnp.where(mask, new.astype(x.dtype), x)


def look_up(site: sites.Site, shapes: dict[str, SiteShape]) -> SiteShape:
    if site.name not in shapes:
        raise ValueError(f"this pass has no site {site.name}; it has: {', '.join(shapes)}")
    return shapes[site.name]


def unit_axis(site: sites.Site) -> int:
    """Which axis of the site its units are on: the first that is neither rows nor tokens."""
    return next(i for i, axis in enumerate(site.axes) if axis not in "BITPSQ")


def token_axis(site: sites.Site) -> int:
    return next(i for i, axis in enumerate(site.axes) if axis in "TPQ")
