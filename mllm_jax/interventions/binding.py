"""Binding: edits and captures in the shapes of a model and a batch.

An address becomes a mask over layers and units, a selector a mask over tokens, and values get a
leading layer axis. Values known before the program runs stay in NumPy, so that they can be checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites
from mllm_jax.batch import Batch
from mllm_jax.interventions.bound_capture import BoundCapture, Places
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import KINDS, BoundEdit, Edit, Edits
from mllm_jax.interventions.forms import FORMS
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.routes import bind_route
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.interventions.splices import LatentSite, check_splice, latent_sites
from mllm_jax.interventions.values import fit_basis, fit_value
from mllm_jax.sites import Address, Site, SiteShape
from mllm_jax.tokens import TokenMap
from mllm_jax.typing import AnyArray, Bool, Int

Shapes = dict[str, SiteShape]
Maps = dict[str, TokenMap]


def bind(
    model: Model,
    batch: Batch,
    edits: Edits | None,
    captures: dict[str, Capture] | None,
    logits: str = "all",
) -> tuple[tuple[BoundEdit, ...], dict[str, BoundCapture]]:
    """Bind edits and captures to a model and a batch.

    Args:
      model: The model.
      batch: The batch that it reads.
      edits: The edits to apply.
      captures: The captures to return, by name.
      logits: The logits that the pass computes, as in `run`.

    Raises:
      ValueError: An edit or capture does not fit, or selects nothing.
    """
    if not edits and not captures:
        return (), {}
    shapes, maps = site_shapes(model, batch), model.token_maps(batch)
    bound_edits, bound_captures = (
        bind_edits(edits, shapes, maps),
        bind_captures(captures, shapes, maps, edits),
    )
    if logits == "last":
        items: list[BoundEdit | BoundCapture] = [*bound_edits, *bound_captures.values()]
        _check_logits_computed(items, batch.last, batch.ids.shape[1])
    return bound_edits, bound_captures


def bind_continuation(
    model: Model, batch: Batch, edits: Edits | None, steps: int
) -> tuple[BoundEdit, ...]:
    """Bind edits to the prompts of a batch and `steps` tokens after each.

    A value with a token axis continues after the prompt with the value at its last token.

    Raises:
      ValueError: See `bind`.
    """
    if not edits:
        return ()
    maps = model.token_maps(batch)
    maps |= {name: maps[name].extended(steps) for name in ("lm", "logits")}
    bound = bind_edits(edits, site_shapes(model, batch), maps)
    _check_logits_computed(bound, batch.last, batch.ids.shape[1])
    return tuple(_continue_values(edit, batch.last, steps) for edit in bound)


def bind_edits(edits: Edits | None, shapes: Shapes, maps: Maps) -> tuple[BoundEdit, ...]:
    """Bind edits to the sites and the tokens of a pass.

    Args:
      edits: The edits to apply.
      shapes: The sites of the pass.
      maps: The token map of each module, and of sites that have their own.

    Raises:
      ValueError: The pass does not have a site, a layer or unit is out of range, a mask or value
        has the wrong shape, or an edit selects nothing.
    """
    latents = latent_sites(edits, shapes)
    shapes = shapes | {name: site.spec for name, site in latents.items()}
    bound = tuple(_bind_edit(edit, shapes, maps, latents) for edit in edits or ())
    _check_latents_spliced(bound)
    return bound


def bind_captures(
    captures: dict[str, Capture] | None,
    shapes: Shapes,
    maps: Maps,
    edits: Edits | None = None,
) -> dict[str, BoundCapture]:
    """Bind captures to the sites and the tokens of a pass; arguments and errors as in `bind_edits`.

    Latents can be captured only at sites with a splice among the edits.
    """
    latents = latent_sites(edits, shapes)
    shapes = shapes | {name: site.spec for name, site in latents.items()}
    return {n: _bind_capture(c, shapes, maps, latents) for n, c in (captures or {}).items()}


def splices(edits: Edits | None) -> Edits:
    """Return the splices among edits, which captures of latents need."""
    return Edits(tuple(edit for edit in edits or () if edit.splice is not None))


def _bind_edit(edit: Edit, shapes: Shapes, maps: Maps, latents: dict[str, LatentSite]) -> BoundEdit:
    site = edit.address.site
    spec = look_up(site, shapes)
    units = edit.address.mask(spec.layers, spec.shape[site.unit_axis])
    if edit.splice is not None:
        check_splice(edit, shapes)
    if site.name in latents:
        of = latents[site.name]
        of.selection(edit.address.layers, site.name)  # each layer that is named has a dictionary
        units, spec = of.of_splices(units), dataclasses.replace(spec, layers=len(of.layers))
        if isinstance(units, np.ndarray) and not units.any():
            raise ValueError(of.no_dictionary(site.name, f"what the {edit.kind} selects"))
    token_map = site.entry(maps)
    where = edit.where.mask(token_map)
    _check_edit_selects(site, units, where)
    fit = fit_basis if KINDS[edit.kind].is_subspace else fit_value
    values = {
        name: fit(sites.as_array(value), edit.address, spec) for name, value in edit.values.items()
    }
    along: dict[str, AnyArray] = {}
    if edit.splice is not None and edit.splice.crosses_layers:
        values = {"layer": np.arange(spec.layers, dtype=np.int32)}
    if edit.route is not None:
        where, along = bind_route(site, where, token_map.readers, *edit.route)
    if edit.on is not None:
        along = {"hidden": edit.on.mask(token_map)}
        _check_edit_selects(site, units, along["hidden"])
    if edit.strengths is not None:
        step = token_map.step.clip(0, len(edit.strengths) - 1)
        known = isinstance(step, np.ndarray) and isinstance(edit.strengths, np.ndarray)
        along["strength"] = (np if known else jnp).take(edit.strengths, step).astype(spec.dtype)
    return BoundEdit(edit.kind, site, edit.fn, units, where, values, along, edit.splice)


def _check_latents_spliced(bound: tuple[BoundEdit, ...]) -> None:
    """Raise an error if an edit of latents is of tokens that no splice covers, where known."""
    for edit in bound:
        if not edit.site.is_latents:
            continue
        covered = [e.tokens for e in bound if e.splice is not None and e.site.latents == edit.site]
        if any(isinstance(tokens, jax.core.Tracer) for tokens in (edit.tokens, *covered)):
            continue
        if not any((np.asarray(edit.tokens) & np.asarray(tokens)).any() for tokens in covered):
            raise ValueError(
                f"the {edit.label} selects no token at which a dictionary is spliced: compare the "
                "where= of both"
            )


def _check_edit_selects(
    site: Site, units: Bool[AnyArray, "L F"], where: Bool[AnyArray, "B T"]
) -> None:
    """Raise an error if an edit is known to select nothing."""
    if not isinstance(units, jax.core.Tracer) and not np.asarray(units).any():
        raise ValueError(f"the edit of {site.name} selects no layer or unit: nothing would change")
    if not isinstance(where, jax.core.Tracer) and not np.asarray(where).any():
        raise ValueError(f"the edit of {site.name} selects no token of this batch (see where=)")


def _continue_values(edit: BoundEdit, last: Int[AnyArray, " B"], steps: int) -> BoundEdit:
    """Repeat the values at the last token of each prompt for `steps` further tokens."""
    site = edit.site
    if site.module not in ("lm", "logits"):
        return edit
    axis, rank = 1 + site.token_axis, 1 + len(site.axes)

    def continued(value):
        if value.ndim != rank or value.shape[axis] == 1:
            return value
        xp = np if isinstance(value, np.ndarray) and isinstance(last, np.ndarray) else jnp
        at = last.reshape(1, -1, *(1,) * (rank - 2))
        by_row = xp.broadcast_to(value, (value.shape[0], at.shape[1], *value.shape[2:]))
        end = xp.take_along_axis(by_row, at, axis)
        return xp.concatenate([by_row, xp.repeat(end, steps, axis)], axis)

    if "S" in site.axes and any(v.ndim == rank and v.shape[-1] > 1 for v in edit.values.values()):
        raise ValueError(
            f"{edit.label}: a value with the axis S gives one number for each key of the prompt, "
            "but generation adds keys; give a value of length 1 on that axis"
        )
    return dataclasses.replace(edit, values=jax.tree.map(continued, edit.values))


def _check_logits_computed(
    items: Iterable[BoundEdit | BoundCapture], last: Int[AnyArray, " B"], prompt: int
) -> None:
    """Raise an error if an item is known to need logits that the pass does not compute.

    A pass for the last token computes its logits, and those of the tokens that follow the prompt.

    Args:
      items: Bound edits and captures.
      last: The position of the last token of each row's prompt.
      prompt: The length T of the prompts.
    """
    for item in items:
        along = getattr(item, "along", {})
        arrays = item.tokens, last, *(along[name] for name in ("row", "at") if name in along)
        if item.site != sites.logits or any(isinstance(a, jax.core.Tracer) for a in arrays):
            continue
        selected, ends, *route = map(np.asarray, arrays)
        at = np.arange(selected.shape[1])
        after = (at >= prompt) & (at < len(at) - 1)  # no logits follow the very last token
        computed = selected & ((at == ends[:, None]) | after)
        if not computed.any():
            raise ValueError(
                "this pass computes the logits of each row's last token only, but an edit or "
                'capture of them is of other tokens: use where=tok.last, or run(..., logits="all")'
            )
        if route:
            row, read = route
            _check_patch_of_logits(
                computed & (read != np.where(at < prompt, ends[row], at)), row, read
            )


def _check_patch_of_logits(wrong: np.ndarray, row: np.ndarray, read: np.ndarray) -> None:
    if wrong.any():
        to, at = np.argwhere(wrong)[0]
        raise ValueError(
            f"the patch of logits matches token {at} of row {to} with token {read[to, at]} of row "
            f"{row[to, at]}, whose logits this pass does not compute: use where=tok.last, or "
            'run(..., logits="all")'
        )


def _bind_capture(
    capture: Capture, shapes: Shapes, maps: Maps, latents: dict[str, LatentSite]
) -> BoundCapture:
    address, site = capture.address, capture.address.site
    spec = look_up(site, shapes)
    if site.name in latents and site.stacked:
        with_dictionary = latents[site.name].selection(address.layers, site.name)
        address = dataclasses.replace(address, layers=with_dictionary)
    FORMS[capture.form].check(capture, shapes)
    layers, units = _captured_layers(address, spec.layers), _captured_units(address, spec)
    token_map, keys, form = site.entry(maps), site.key_entry(maps), FORMS[capture.form]
    bound = BoundCapture(
        form=capture.form,
        site=site,
        by=_tile_names(keys) if capture.by == ("tile",) else capture.by,
        k=capture.k,
        count=layers.count,
        single=not site.stacked or address.layers.form == "one",
        slots=layers.slots,
        order=layers.order,
        absent=layers.absent,
        units=units,
        tokens=capture.where.mask(token_map),
        kind=token_map.kind,
        on=None if capture.on is None else capture.on.mask(keys),
        rows=maps["lm"].valid_row,
        readers=token_map.readers,
        edges=capture.edges,
        places=places_of(token_map, maps["lm"]) if form.needs_places else None,
        keys=keys if form.needs_keys else None,
        heads=capture.heads,
    )
    _check_capture_selects(bound)
    return bound


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The fields of `BoundCapture` for the captured layers."""

    count: int
    slots: Int[AnyArray, " L"] | None = None
    order: Int[AnyArray, " count"] | None = None
    absent: Bool[AnyArray, " count"] | None = None


def _captured_layers(address: Address, layers: int) -> _Layers:
    """Return the layers that a capture reads, of a site with this number of layers."""
    site = address.site
    if not site.stacked or address.layers.form == "all":
        return _Layers(layers)
    index, absent = _indices(address.layers, layers, f"{site.name}: layer")
    count = len(absent)
    if not count:
        raise ValueError(f"the capture of {site.name} selects no layer")
    slots = _slots(index, layers)
    if isinstance(slots, np.ndarray):
        return _Layers(count, slots, slots[index], absent)
    order = slots.at[index].get(mode="fill", fill_value=count)
    return _Layers(count, slots, order, absent)


def _captured_units(address: Address, spec: SiteShape) -> Int[AnyArray, " n"] | None:
    """Return the units that a capture returns; None for all."""
    site = address.site
    if address.units.form == "all":
        return None
    units, _ = _indices(address.units, spec.shape[site.unit_axis], f"{site.name}: unit")
    if not len(units):
        raise ValueError(f"the capture of {site.name} selects no unit")
    return units


def places_of(token_map: TokenMap, rows: TokenMap) -> Places:
    """Return the positions of the tokens of a module in the data.

    Args:
      token_map: The token map of the module.
      rows: The token map of the rows of the batch.
    """
    xp: Any = np if isinstance(token_map.kind, np.ndarray) else jnp
    is_row = rows.valid_row
    number = xp.cumsum(is_row) - 1
    if token_map.readers is None:
        example = number
        token = xp.cumsum(token_map.valid, -1) - 1
    else:
        example = number[xp.asarray(token_map.readers).argmax(0)]
        token = xp.broadcast_to(xp.arange(token_map.kind.shape[1]), token_map.kind.shape)
    return Places(
        example.astype(np.int32), token.astype(np.int32), token_map.tile, token_map.row,
        token_map.column, is_row.sum().astype(np.int32),
    )  # fmt: skip


def _tile_names(keys: TokenMap) -> tuple[str, ...]:
    """Return the names of the image tiles of the rows, "tile 0" and so on."""
    if isinstance(keys.tile, jax.core.Tracer):
        raise ValueError(
            'by="tile" needs a batch that is known: how many tiles a row has is part of the program'
        )
    count = int(np.max(keys.tile, initial=-1)) + 1
    if not count:
        raise ValueError('by="tile": this batch has no picture, so no tile')
    return tuple(f"tile {number}" for number in range(count))


def _check_capture_selects(bound: BoundCapture) -> None:
    """Raise an error if a capture is known to select no token."""
    form, on, readers = FORMS[bound.form], bound.on, bound.readers
    if not form.needs_a_token:
        return
    if any(isinstance(a, jax.core.Tracer) for a in (bound.tokens, on, bound.rows, readers)):
        return
    what = f"the {bound.form} of {bound.site.name} selects no"
    count = np.asarray(bound.tokens).sum(-1)
    if readers is not None:
        count = np.asarray(readers) @ count
    if not count.any():
        raise ValueError(f"{what} token of this batch (see where=)")
    if on is not None and not np.asarray(on).any():
        raise ValueError(f"{what} key of this batch (see on=)")
    without = np.flatnonzero(np.asarray(bound.rows) & (count == 0))
    if form.needs_every_row and len(without):
        raise ValueError(
            f"{what} token of row {without[0]}, so that row has no {bound.form}: select others "
            "with where=, or leave such rows out of the batch"
        )


def _indices(
    selection: sites.Selection, size: int, what: str
) -> tuple[Int[AnyArray, " n"], Bool[AnyArray, " n"]]:
    """Return the selected indices of an axis, `size` for absent ones, and which are absent.

    Only traced indices can be absent; a known one out of range raises an error.
    """
    if selection.form in ("one", "index") and isinstance(selection.value, jax.core.Tracer):
        index = jnp.atleast_1d(selection.value)
        absent = (index < -size) | (index >= size)
        return jnp.where(absent, size, index % size), absent
    known = selection.indices(size, what)
    return known, np.zeros(len(known), bool)


def _slots(index: Int[AnyArray, " count"], layers: int) -> Int[AnyArray, " L"]:
    """Return the slot of each layer, `count` for layers that are not captured."""
    if isinstance(index, np.ndarray):
        slots = np.full((layers,), len(index), np.int32)
        slots[index] = np.arange(len(index))
        return slots
    return (
        jnp.full((layers,), len(index), jnp.int32)
        .at[index]
        .set(jnp.arange(len(index)), mode="drop")
    )
