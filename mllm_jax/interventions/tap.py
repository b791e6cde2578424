"""Taps: how a network offers its sites.

A network calls `x = tap(site, x)` where it computes the tensor of a site. While a program is
traced, the tap applies the edits of that site and reads its captures; without any, it adds nothing
to the program. A tensor that only its site needs is not computed if `tap.idle(site, shape)`. Taps
exist during one trace: they are internal to a pure function, not state that outlives it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax import sites
from mllm_jax.interventions import forms, receipts
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.edits import BoundEdit
from mllm_jax.interventions.layer_tap import LayerTap
from mllm_jax.numerics import indexing
from mllm_jax.typing import AnyArray, Array, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Resume:
    """The point at which a pass resumes in the middle of a module's layers.

    Attributes:
      start: The first layer to run, int32[].
      x: The input of that layer; None for the input that the pass itself computes, at layer 0.
      captured: The results of the captures in a pass through all layers, which the layers below
        `start` keep.
      stop: The first layer that runs only for `places`, int32[]: the last layer, or L for none.
      places: The tokens whose final states are needed, int32[B]; None for all.
    """

    start: Int[AnyArray, ""]
    x: Float[Array, "B T D"] | None
    captured: dict[str, Any]
    stop: Int[AnyArray, ""] | None = None
    places: Int[AnyArray, " B"] | None = None


class Taps:
    """The edits and captures of one forward pass, and their results.

    Attributes:
      edits: Edits bound to the shapes of this pass.
      captures: Captures bound to the shapes of this pass, by name.
      at: The position in the token masks of the first token of this pass, int32[]; not 0 when a
        pass continues from a cache.
      resume: The points at which to resume, for modules whose lower layers were run before.
      remat: Whether a layer's tensors are recomputed in the backward pass.
      shapes: The sites of the pass, by name.
      receipts: The measurements of each edit, by its number; see `receipts.measure`.
      captured: The results of the captures, by name.
    """

    def __init__(
        self,
        edits: tuple[BoundEdit, ...] = (),
        captures: dict[str, BoundCapture] | None = None,
        *,
        at: int | Int[Array, ""] = 0,
        resume: dict[str, Resume] | None = None,
        remat: bool = False,
    ):
        self.edits = edits
        self.captures = captures or {}
        self.at = at
        self.resume = resume or {}
        self.remat = remat
        self.shapes: dict[str, sites.SiteShape] = {}
        self.receipts: dict[int, Any] = {}
        self.captured: dict[str, Any] = {}

    def with_items(self, edits: tuple[BoundEdit, ...], captures: dict[str, BoundCapture]) -> Taps:
        """Return taps of other edits and captures, whose results are added to these taps."""
        taps = Taps(edits, captures, at=self.at, resume=self.resume, remat=self.remat)
        taps.shapes, taps.receipts, taps.captured = self.shapes, self.receipts, self.captured
        return taps

    def module(self, name: str, lens: Callable | None = None) -> ModuleTap:
        """Return the taps of one module; `lens` turns its residual into logits."""
        return ModuleTap(self, name, lens)

    def results(self) -> dict[str, Any]:
        """Return the results of the captures by name, as a pass returns them."""
        return forms.complete(self.captures, self.captured)

    def receipt_list(self) -> tuple[receipts.Receipt, ...]:
        """Return the receipts in the order of the edits."""
        return tuple(
            receipts.Receipt(edit.label, *self.receipts[i]) for i, edit in enumerate(self.edits)
        )


class ModuleTap:
    """The taps of one module, called at the sites that exist once and scanned over its layers.

    Attributes:
      taps: The taps of the whole pass.
      name: The name of the module.
      lens: A function from the module's residual to logits.
      edits: The edits of the module, by number.
      captures: The captures of the module, by name.
    """

    def __init__(self, taps: Taps, name: str, lens: Callable | None):
        self.taps, self.name, self.lens = taps, name, lens
        self.edits = {i: e for i, e in enumerate(taps.edits) if e.site.module == name}
        self.captures = {n: c for n, c in taps.captures.items() if c.site.module == name}

    def __call__(self, site: sites.Site, x: Shaped[Array, ...]) -> Shaped[Array, ...]:
        """Return the tensor of a site with its edits applied, and read its captures."""
        tap = self._tap(1, _first(_at(self.edits, False)), _at(self.captures, False))
        x = tap(site, x)
        self.taps.receipts |= _add_axis(tap.receipts)
        self.taps.captured |= tap.captured
        return x

    def only(self, *chosen: sites.Site) -> ModuleTap:
        """Return the taps of some sites of a module whose sites have unequal numbers of layers."""
        tap = ModuleTap(self.taps, self.name, self.lens)
        tap.edits = {i: edit for i, edit in self.edits.items() if edit.site in chosen}
        tap.captures = {n: c for n, c in self.captures.items() if c.site in chosen}
        return tap

    def scan(
        self, step: Callable, layers: Any, x: Float[Array, "B T D"], extra: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run x through every layer with one compiled body.

        Args:
          step: (layer, x, tap, extra) -> (x, out). If a pass may need only some tokens, it also
            takes `only=places`, int32[B], and then returns x as [B, 1, D].
          layers: A module whose arrays have a leading axis L; or a sequence of layers, which are
            traced without a scan.
          x: The input of the first layer.
          extra: Further arrays with a leading axis L; each step gets its slice.

        Returns:
          x after the last layer, and the stacked outs [L, ...].
        """
        if isinstance(layers, tuple):
            more = [jax.tree.map(lambda a, i=i: a[i], extra) for i in range(len(layers))]
            x, outs = self._one_by_one(step, layers, x, more)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)
        count = jax.tree.leaves(layers)[0].shape[0]
        edits, captures = _at(self.edits, True), _at(self.captures, True)
        arrays = _stacked(edits), _slots(captures)
        if self.name in self.taps.resume:
            return self._resumed(step, layers, x, extra, edits, captures, arrays, count)

        whole = jax.lax.stop_gradient((layers, extra))  # gradients flow through the scanned slices

        def run_layer(sliced, x, tap, i):
            layer, more = indexing.index_without_upcast(sliced, whole, i)
            return step(layer, x, tap, more)

        def body(carry, inputs):
            x, kept, states, carried = carry
            sliced, i, (edit_arrays, slots) = inputs
            here = _with_slots(captures, slots, states)
            tap = self._tap(count, _unstack(edits, edit_arrays), here, carried)
            x, out = self._checkpointed(run_layer)(sliced, x, tap, i)
            kept = {n: _put(kept[n], tap.captured.pop(n), slots[n]) for n in kept}
            return (x, kept, tap.states, tap.carried), (out, (tap.receipts, tap.captured))

        kept = self._empty_slots(step, layers, x, extra, edits, captures, count)
        inputs = (layers, extra), indexing.layer_indices(whole), arrays
        start: Any = x, kept, forms.states(captures), _carried(edits, x)
        (x, kept, *_), (out, (receipts_, captured)) = jax.lax.scan(body, start, inputs)
        self.taps.receipts |= receipts_
        self.taps.captured |= captured | _finish(kept, captures)
        return x, out

    def _resumed(self, step, layers, x, extra, edits, captures, arrays, count):
        """Run the layers from `resume.start` on, which is data: one program for every start."""
        resume = self.taps.resume[self.name]
        x = x if resume.x is None else resume.x

        def at(i):
            whole = layers, extra
            return indexing.index_without_upcast(jax.tree.map(lambda a: a[i], whole), whole, i)

        def run_layer(i, x, carried):
            (layer, more), (edit_arrays, slots) = at(i), jax.tree.map(lambda a: a[i], arrays)
            here = _with_slots(captures, slots)
            tap = self._tap(count, _unstack(edits, edit_arrays), here, carried)
            x, out = step(layer, x, tap, more)
            places = {name: slots.get(name, i) for name in captures}
            return (x, tap.carried), tap.receipts, tap.captured, places, out

        def body(i, carry):
            x, receipts_, captured, carried = carry
            (x, carried), receipt, results, places, _ = run_layer(i, x, carried)
            captured = {n: _put(captured[n], results[n], places[n]) for n in captured}
            return x, _put(receipts_, receipt, i), captured, carried

        def run_last_layer(x):
            layer, more = at(count - 1)
            y, _ = step(layer, x, self._tap(count, {}, {}), more, only=resume.places)
            return x.at[jnp.arange(len(x)), resume.places].set(y[:, 0])

        # No edit precedes the layer at which a pass resumes, so nothing is carried into it.
        carried = _carried(edits, x)
        _, receipt, _, _, out = jax.eval_shape(run_layer, 0, x, carried)
        receipts_ = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), receipt)
        before = {n: _unfinish(resume.captured[n], captures[n]) for n in captures}
        # The first layer runs by itself: vmap computes what precedes its edits once for all lanes.
        carry = body(resume.start, (x, receipts_, before, carried))
        stop = count if resume.places is None else resume.stop
        x, receipts_, captured, _ = jax.lax.fori_loop(resume.start + 1, stop, body, carry)
        if resume.places is not None:
            x = jax.lax.cond(stop < count, run_last_layer, lambda x: x, x)
        kept = {n: captured.pop(n) for n in arrays[1]}
        self.taps.receipts |= receipts_
        self.taps.captured |= captured | _finish(kept, captures)
        return x, jax.tree.map(lambda _: None, out)  # some layers have no out

    def _checkpointed(self, step: Callable) -> Callable:
        """Return a step that keeps its matrix products for the backward pass; with remat, nothing.

        The products cost most of the time, the tensors between them most of the memory. Latents are
        recomputed as well: otherwise every layer of a scan would store those of every splice.
        """
        policies = jax.checkpoint_policies
        policy: Callable = policies.dots_with_no_batch_dims_saveable
        if self.taps.remat:
            policy = policies.nothing_saveable
        elif splices := [edit.splice for edit in self.edits.values() if edit.splice]:
            widths = {splice.dictionary.widths[1] for splice in splices}
            policy = functools.partial(_keep_narrow_products, widths=widths)

        def checkpointed(layer, x, tap, extra):
            # The tap collects while it is traced; what it collects must leave through the outputs.
            def pure(layer, x, extra):
                inside = tap.emptied()
                out = step(layer, x, inside, extra)
                return out, inside.receipts, inside.captured, inside.states, inside.carried

            # A scan already prevents common subexpression elimination with the backward pass.
            pure = jax.checkpoint(pure, policy=policy, prevent_cse=False)
            out, tap.receipts, tap.captured, tap.states, tap.carried = pure(layer, x, extra)
            return out

        return checkpointed

    def loop(self, step: Callable, layers: Sequence, x: jax.Array) -> jax.Array:
        """Run x through a few layers of unequal shapes; step is (layer, x, tap) -> x."""
        nothing = [None] * len(layers)
        return self._one_by_one(
            lambda layer, x, tap, _: (step(layer, x, tap), None), layers, x, nothing
        )[0]

    def _one_by_one(
        self, step: Callable, layers: Sequence, x: jax.Array, extra: Sequence
    ) -> tuple[jax.Array, list]:
        """Run x through layers without a scan; `scan` describes the step.

        Args:
          step: The function that is traced for each layer.
          layers: The layers.
          x: The input of the first layer.
          extra: Further arguments of each step.

        Returns:
          x after the last layer, and the outs.
        """
        edits, captures = _at(self.edits, True), _at(self.captures, True)
        arrays, slots = _stacked(edits), _slots(captures)
        kept, results, outs, states = {}, [], [], forms.states(captures)
        carried = _carried(edits, x)
        for i, (layer, more) in enumerate(zip(layers, extra, strict=True)):
            now = _unstack(edits, jax.tree.map(lambda a, i=i: a[i], arrays))
            here = _with_slots(captures, {name: s[i] for name, s in slots.items()}, states)
            tap = self._tap(len(layers), now, here, carried)
            x, out = step(layer, x, tap, more)
            states, carried = tap.states, tap.carried
            outs.append(out)
            for name in slots:
                value = tap.captured.pop(name)
                if name not in kept:
                    kept[name] = _zeros(value, captures[name].count)
                kept[name] = _put(kept[name], value, slots[name][i])
            results.append((tap.receipts, tap.captured))
        if results:
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *results)
            self.taps.receipts |= stacked[0]
            self.taps.captured |= stacked[1] | _finish(kept, captures)
        return x, outs

    def _tap(
        self, layers: int, edits: dict, captures: dict, carried: dict[int, Array] | None = None
    ) -> LayerTap:
        return LayerTap(
            self.taps.shapes, self.taps.at, self.lens, layers, edits, captures,
            carried=dict(carried or {}),
        )  # fmt: skip

    def _empty_slots(self, step, layers, x, extra, edits, captures, count):
        """Return zeros for the captures that are carried, whose shapes are found abstractly."""
        slots = _slots(captures)
        if not slots:
            return {}

        def first():
            layer, more, arrays, at = jax.tree.map(
                lambda a: a[0], (layers, extra, _stacked(edits), slots)
            )
            here = _with_slots(captures, at, forms.states(captures))
            tap = self._tap(count, _unstack(edits, arrays), here, _carried(edits, x))
            step(layer, x, tap, more)
            return {name: tap.captured[name] for name in slots}

        return {name: _zeros(s, captures[name].count) for name, s in jax.eval_shape(first).items()}


def _keep_narrow_products(primitive: Any, *inputs: Any, widths: set[int], **params: Any) -> bool:
    """Return whether an operation is a product without an axis of one of these lengths."""
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params):
        return False
    contracted, _ = params["dimension_numbers"]
    return not any(
        length in widths
        for x, axes in zip(inputs, contracted, strict=True)
        for axis, length in enumerate(x.shape)
        if axis not in axes
    )


def _finish(kept: dict[str, Any], captures: dict[str, BoundCapture]) -> dict[str, Any]:
    return {name: captures[name].finish(value) for name, value in kept.items()}


def _at(items: dict, stacked: bool) -> dict:
    """Return the edits or captures of sites that exist per layer, or of those that do not."""
    return {key: item for key, item in items.items() if item.site.stacked == stacked}


def _stacked(edits: dict) -> dict:
    """Return the arrays of edits with a leading axis L, or of splices for edits of latents."""
    return {i: (edit.units, edit.values) for i, edit in edits.items() if not edit.site.is_latents}


def _unstack(edits: dict, arrays: dict) -> dict:
    """Return edits with the arrays of one layer; edits of latents keep all arrays."""
    return edits | {
        i: dataclasses.replace(edits[i], units=units, values=values)
        for i, (units, values) in arrays.items()
    }


def _carried(edits: dict[int, BoundEdit], x: Float[Array, "B T D"]) -> dict[int, Array]:
    """Return the arrays that cross-layer splices carry into the first layer, if they have edits."""
    edited = {edit.site for edit in edits.values()}
    return {
        number: edit.splice.carry(x)
        for number, edit in edits.items()
        if edit.splice is not None
        and edit.splice.crosses_layers
        and (edit.site.latents in edited or not edit.splice.error)
    }


def _first(edits: dict) -> dict:
    return _unstack(edits, jax.tree.map(lambda a: a[0], _stacked(edits)))


def _slots(captures: dict) -> dict:
    return {name: c.slots for name, c in captures.items() if c.slots is not None}


def _with_slots(captures: dict, slots: dict, states: dict | None = None) -> dict:
    """Return captures for one layer: the slot of its result, and the carried state."""
    carried = states or {}
    return {
        name: dataclasses.replace(c, slots=slots.get(name), state=carried.get(name))
        for name, c in captures.items()
    }


def _zeros(value: Any, count: int) -> Any:
    """Return zeros for `count` layers, and one slot for the layers that are not captured."""
    return jax.tree.map(lambda s: jnp.zeros((count + 1, *s.shape), s.dtype), value)


def _put(slots: Any, value: Any, slot: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda s, v: s.at[slot].set(v), slots, value)


def _add_axis(tree: Any) -> Any:
    return jax.tree.map(lambda a: a[None], tree)


def _unfinish(value: Any, capture: BoundCapture) -> Any:
    """Invert `_finish`: add the slot of the layers that are not captured."""
    if capture.slots is None:
        return value
    value = _add_axis(value) if capture.single else value
    return jax.tree.map(lambda a: jnp.pad(a, ((0, 1), *((0, 0),) * (a.ndim - 1))), value)
