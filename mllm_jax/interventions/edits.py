"""Edits: changes of a forward pass, as a pytree.

The kind and the site of an edit are structure; layers, neurons, tokens and values are arrays, so
changing them never recompiles. Before an edit enters the program it is bound (see `binding`): its
address becomes a mask over layers and units, its selector a mask over tokens, and its values get a
leading layer axis. `KINDS` registers every kind of edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, sites, tokens
from mllm_jax.arguments import type_error
from mllm_jax.interventions import site_rules
from mllm_jax.interventions.splices import CrossLayerDictionary, Dictionary, Splice
from mllm_jax.interventions.values import is_real
from mllm_jax.numerics import precision
from mllm_jax.selections import as_int32
from mllm_jax.sites import Address, Target
from mllm_jax.tokens import Selector
from mllm_jax.typing import AnyArray, Array, ArrayLike, Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of a site, as defined by the user.

    Attributes:
      kind: A name of `KINDS`. Static.
      address: The site with the layers and units that change.
      where: The tokens that change.
      values: Arrays by name, in the shapes that the kind allows.
      fn: The function of a `call`. Static.
      route: The rows that a patch reads and the rows that it writes, int32[] or int32[n] each.
      on: The keys that a knockout hides.
      strengths: The strength at each step of generation, float[steps]; see `per_step`.
      splice: The dictionary of a splice.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    values: dict[str, ArrayLike]
    fn: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    route: tuple[Int[AnyArray, ...], Int[AnyArray, ...]] | None = None
    on: tokens.Where | None = None
    strengths: Float[AnyArray, " steps"] | None = None
    splice: Splice | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """Edits in the order in which they apply at each site; `first >> second` composes them.

    Attributes:
      items: The edits.
    """

    items: tuple[Edit, ...] = ()

    def __rshift__(self, other: Edits) -> Edits:
        if not isinstance(other, Edits):
            return NotImplemented
        return Edits(self.items + other.items)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def _repr_html_(self) -> str:
        return notebook.edits(self)


def _edit(
    kind: str,
    target: Target,
    where: Selector,
    values: dict[str, ArrayLike] | None = None,
    **fields,
) -> Edits:
    address = Address.of(target)
    site_rules.check_edit(kind, address.site)
    return Edits((Edit(kind, address, tokens.of(where), values or {}, **fields),))


def ablate(target: Target, *, where: Selector = None) -> Edits:
    """Set a site to zero.

    Args:
      target: A site, an address, or a mask bool[L, F] of `lm.mlp.act`.
      where: A token selector or a mask bool[B, T]; all tokens by default.
    """
    return _edit("ablate", target, where)


def scale(target: Target, by: ArrayLike, *, where: Selector = None) -> Edits:
    """Multiply a site by a value.

    Args:
      target: See `ablate`.
      by: A scalar, one value per unit [F] or [L, F], or a value with all axes of the site,
        [B, T, F] or [L, B, T, F], of length 1 where it repeats. At `lm.attn.heads`, where a unit is
        a head, these are [N], [L, N], [N, H], [L, N, H], [B, T, N, H] or [L, B, T, N, H]. If the
        address lists units, as in `act[12, [7, 3]]`, the axis of units has one value per listed
        unit, in that order. In generation, generated tokens take the value at the last token of
        their row's prompt.
      where: See `ablate`.
    """
    return _edit("scale", target, where, {"value": by})


def add(target: Target, value: ArrayLike, *, where: Selector = None) -> Edits:
    """Add a value to a site (steering); arguments and shapes as in `scale`."""
    return _edit("add", target, where, {"value": value})


def replace(target: Target, value: ArrayLike, *, where: Selector = None) -> Edits:
    """Set a site to a value, such as a mean; arguments and shapes as in `scale`."""
    return _edit("replace", target, where, {"value": value})


def project_out(target: Target, basis: ArrayLike, *, where: Selector = None) -> Edits:
    """Remove a subspace: x - x U U^T, where U is an orthonormal basis of the given columns.

    Args:
      target: See `ablate`.
      basis: The directions, [D] or [D, r], not necessarily orthonormal.
      where: See `ablate`.
    """
    return _edit("project_out", target, where, {"basis": basis})


def patch(
    target: Target,
    source: ArrayLike,
    into: ArrayLike,
    *,
    where: Selector = None,
    basis: ArrayLike | None = None,
) -> Edits:
    """Copy values of row `source` into row `into` of the same batch: activation patching.

    The selected tokens of both rows are matched in order, so rows may differ in length. At a site
    of the vision tower, the Q-Former or the projector they are the tokens of all tiles of a row's
    pictures, in order. Rows that share a picture get a copy each, so that no other row changes.
    Inside a `jax.jit` that traces the batch this is impossible: a row whose pictures are shared is
    not written there.

    Args:
      target: See `ablate`.
      source: The row of the batch that is read; a list for several pairs, which all read the values
        from before the patch.
      into: The row that is written; a list of as many rows as `source`.
      where: See `ablate`.
      basis: The subspace to exchange (interchange, DAS), [D] or [D, r]; the whole space by default.
    """
    values = {} if basis is None else {"basis": basis}
    rows = sites.as_array(source), sites.as_array(into)
    if wrong := [r.dtype for r in rows if not jnp.issubdtype(r.dtype, np.integer)]:
        raise ValueError(f"source and into of patch must be row numbers, not {wrong[0]}")
    route = as_int32(rows[0]), as_int32(rows[1])
    return _edit("patch", target, where, values, route=route)


def knockout(target: Target, *, to: Selector = None, on: Selector = None) -> Edits:
    """Hide keys from queries, in the boolean attention mask.

    Args:
      target: `sites.lm.attn` or `sites.vision.attn`, or layers and heads of it:
        `sites.lm.attn[10:, [0, 3]]`.
      to: The queries. In the vision tower they attend only to patches of their own tile.
      on: The keys that are hidden from the queries.
    """
    return _edit("knockout", target, to, on=tokens.of(on))


def call(target: Target, fn: Callable, *, where: Selector = None, **arrays: ArrayLike) -> Edits:
    """Apply a function of your own to a site: fn(x, **arrays) -> x.

    Args:
      target: See `ablate`.
      fn: A pure function in jax.numpy. Each function compiles a new program, so define it once and
        pass whatever varies as arrays.
      where: See `ablate`.
      **arrays: Values in the shapes of `scale`; fn gets them with the rank of the site.
    """
    if not callable(fn):
        raise type_error("fn", fn, "a function of jax.numpy: fn(x, **arrays) -> x")
    return _edit("call", target, where, arrays, fn=fn)


def splice(
    target: Target,
    dictionary: Dictionary | CrossLayerDictionary,
    *,
    error: bool = True,
    reads: sites.Site | None = None,
    where: Selector = None,
) -> Edits:
    """Replace a site by its reconstruction from a dictionary, and make the latents a site.

    The latents of `splice(lm.resid_post[14], dictionary)` are `lm.resid_post.latents[14]`. They are
    edited and captured like neurons, by edits and captures in the same pass as the splice.

    A cross-layer transcoder is spliced at all layers of a site at once. Edits of its latents change
    the reconstruction in their layer and in later ones.

    Args:
      target: One layer of a site with a vector for each token (heads are joined to one vector). The
        whole site for a cross-layer transcoder.
      dictionary: A dictionary, such as `load_dictionary` returns; or a cross-layer transcoder.
      error: Whether to add the reconstruction error back, so that the site changes only by the
        effect of edited latents, and not at all without such edits.
      reads: The site that is encoded, `lm.mlp.input` for a transcoder at `lm.mlp.out`; by default
        the target itself. A cross-layer transcoder has no default: most read `lm.resid_mid`.
      where: The tokens that are replaced and whose latents can be edited.
    """
    address = Address.of(target)
    if isinstance(dictionary, CrossLayerDictionary):
        _check_cross_layer(address, reads)
    elif (address.layers.form != "one" and address.site.stacked) or address.units.form != "all":
        raise ValueError(
            f"splice takes one layer of {address.site} and all its units, such as "
            "lm.resid_post[14]: chain one splice for each layer with >>"
        )
    reads = reads or address.site
    site_rules.check_edit("splice", reads)
    return _edit("splice", address, where, splice=Splice(dictionary, error, reads))


def _check_cross_layer(address: Address, reads: sites.Site | None) -> None:
    site = address.site
    if not site.stacked or address.layers.form != "all" or address.units.form != "all":
        raise ValueError(
            f"a cross-layer transcoder is spliced at all layers of a site, such as lm.mlp.out, not "
            f"at a part of {site}"
        )
    if reads is None:
        raise ValueError(
            "splice of a cross-layer transcoder needs the site that its latents read: "
            "reads=lm.resid_mid for hook_resid_mid in its config.yaml, or reads=lm.mlp.input"
        )


def per_step(edits: Edits, strengths: ArrayLike) -> Edits:
    """Give edits their own strength s at each step of generation: (1 - s) x + s edit(x).

    Step 0 reads the prompt and step i the i-th token of the answer, also in a pass over prompt and
    answer. The last strength applies to all later steps.

    Args:
      edits: The edits to apply.
      strengths: One strength per step, float[steps]: 0 leaves x unchanged, 1 applies the edit.
    """
    if not isinstance(edits, Edits):
        raise type_error("edits", edits, "edits: per_step(mj.add(...), strengths)")
    by_step = sites.as_array(strengths)
    if not is_real(by_step):
        raise ValueError(f"per_step takes strengths that are real numbers, not {by_step.dtype}")
    if by_step.ndim != 1 or not len(by_step):
        raise ValueError(f"per_step takes strengths [steps], got shape {by_step.shape}")
    for edit in edits:
        if not KINDS[edit.kind].has_strength:
            raise ValueError(f"a {edit.kind} has no strength for per_step")
        if edit.strengths is not None:
            raise ValueError(f"the {edit.kind} of {edit.address.site} already has strengths")
    return Edits(tuple(dataclasses.replace(edit, strengths=by_step) for edit in edits))


def _project_out(x, basis):
    return x - _project_onto(x, basis)


def _project_onto(x, basis):
    """Return the part of x in the span of orthonormal columns, in float32 or better."""
    inside = precision.einsum("...D,Dr->...r", precision.at_least_float32(x), basis)
    return precision.einsum("...r,Dr->...D", inside, basis)


def _patch(x, basis=None, *, row, at):
    source = x[row, at]
    if basis is None:
        return source
    return x + _project_onto(precision.at_least_float32(source) - x, basis)


@dataclasses.dataclass(frozen=True)
class EditKind:
    """A kind of edit, with everything that binding and JSON need to know about it.

    `grammar.EDITS` defines the syntax of the kinds that text can express.

    Attributes:
      build: The public function that makes such an edit.
      apply: The change itself, (x, **values, **along) -> x; None if the edit contains a function.
      is_subspace: Whether its values are bases [D, r] instead of values in the shape of the site.
      has_strength: Whether `per_step` applies.
    """

    build: Callable[..., Edits]
    apply: Callable | None
    is_subspace: bool = False
    has_strength: bool = True


KINDS: dict[str, EditKind] = {
    "ablate": EditKind(ablate, lambda x: jnp.zeros_like(x)),
    "scale": EditKind(scale, lambda x, value: x * value),
    "add": EditKind(add, lambda x, value: x + value),
    "replace": EditKind(replace, lambda x, value: jnp.broadcast_to(value, x.shape)),
    "project_out": EditKind(project_out, _project_out, is_subspace=True),
    "patch": EditKind(patch, _patch, is_subspace=True),
    "knockout": EditKind(
        knockout, lambda x, *, hidden: x & ~hidden[:, None, None, :], has_strength=False
    ),
    "call": EditKind(call, None),
    "splice": EditKind(splice, None, has_strength=False),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundEdit:
    """An edit in the shapes of a model and a batch.

    Attributes:
      kind: A name of `KINDS`. Static.
      site: The site that it changes. Static.
      fn: The function of a `call`. Static.
      units: The layers and units that change, bool[L, F], or bool[L, 1] for all units; L is 1 if
        the site exists once.
      tokens: The tokens that change, bool[B, T].
      values: Arrays by name, with a leading L axis and then the rank of the site.
      along: Arrays [B, T] along the tokens: the `row` and token (`at`) that a patch reads, the keys
        that a knockout has `hidden`, the `strength` of any edit.
      splice: The dictionary of a splice. Edits of latents have a leading axis over the splices of
        their site in place of L.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    fn: Callable | None = dataclasses.field(metadata={"static": True})
    units: Bool[AnyArray, "L F"]
    tokens: Bool[AnyArray, "B T"]
    values: dict[str, Shaped[AnyArray, "L ..."]]
    along: dict[str, Shaped[AnyArray, "B T"]]
    splice: Splice | None = None

    @property
    def is_transparent(self) -> bool:
        """Whether the edit by itself leaves its site unchanged."""
        return self.splice is not None and self.splice.error

    def at_layer(self, layer: int | Int[AnyArray, ""]) -> BoundEdit:
        """Return the edit with the arrays of one entry of its leading axis."""
        units, values = jax.tree.map(lambda a: a[layer], (self.units, self.values))
        return dataclasses.replace(self, units=units, values=values)

    @property
    def label(self) -> str:
        """The kind and the site, the name of the edit in a receipt."""
        return f"{self.kind} {self.site.name}"

    def apply(self, x: Shaped[Array, ...], mask: Bool[AnyArray, ...]) -> Shaped[Array, ...]:
        """Return x, changed where the mask is True. The values are those of one layer."""
        along = dict(self.along)
        strength = along.pop("strength", None)
        change = self.fn or KINDS[self.kind].apply
        assert change is not None, f"{self.kind} has no function"
        new = change(x, **self.values, **along)
        if not hasattr(new, "dtype") or jnp.issubdtype(new.dtype, np.complexfloating):
            kind = getattr(new, "dtype", type(new).__name__)
            raise ValueError(f"the {self.label} returned {kind}: return an array of real numbers")
        if self.fn is not None and new.shape != x.shape:
            raise ValueError(f"the {self.label} returned {new.shape} for an x of {x.shape}")
        if strength is not None:
            new = (1 - strength) * x + strength * new
        return jnp.where(mask, new.astype(x.dtype), x)
