"""Taps: how a network offers its sites.

A network calls `x = tap(site, x)` where it computes the tensor of a site. While a program is
traced, the tap applies the edits of that site and reads its captures; it leaves nothing behind
when there are none. A tensor that would be made for its site alone is made unless `tap.idle(site,
shape)`. Taps live during one trace: they are how a pure function is written, not
state that outlives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax import sites
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions import receipts
from mllm_jax.numerics import indexing
from mllm_jax.sharding import mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Resume:
    """Where a pass goes on in the middle of a module's layers.

    Attributes:
      start: int32[], the first layer to run.
      x: what enters it; None for what the pass has itself, at the first layer of all.
      captured: what the captures found in a pass through all layers: those below stay.
      stop: int32[], the first layer that is run for `places` alone: the last, or none.
      places: int32[B], the tokens whose final state is asked; None for all.
    """

    start: Any
    x: Any
    captured: dict[str, Any]
    stop: Any = None
    places: Any = None


class Taps:
    """What one forward pass was asked, and what it found.

    Attributes:
      edits, captures: bound to the shapes of this pass.
      at: int32[], the position of the first token of this pass in the token masks: not 0 when
        a cached pass reads on.
      resume: of a module whose lower layers were run before: where to go on.
      remat: whether a layer's tensors are computed again in the backward pass.
      shapes: the sites met, by name.
      receipts: by number of the edit. captured: by name of the capture.
    """

    def __init__(
        self,
        edits: tuple[edits_.BoundEdit, ...] = (),
        captures: dict[str, captures_.BoundCapture] | None = None,
        *,
        at: Any = 0,
        resume: dict[str, Resume] | None = None,
        remat: bool = False,
    ):
        self.edits = edits
        self.captures = captures or {}
        self.at = at
        self.resume = resume or {}
        self.remat = remat
        self.shapes: dict[str, edits_.SiteShape] = {}
        self.receipts: dict[int, Any] = {}
        self.captured: dict[str, Any] = {}

    def module(self, name: str, lens: Callable | None = None) -> ModuleTap:
        """The taps of one module; `lens` turns its residual into logits."""
        return ModuleTap(self, name, lens)

    def receipt_list(self) -> tuple[receipts.Receipt, ...]:
        """In the order of the edits."""
        return tuple(
            receipts.Receipt(f"{edit.kind} {edit.site.name}", *self.receipts[i])
            for i, edit in enumerate(self.edits)
        )


@dataclasses.dataclass
class Tap:
    """The taps of one layer while it is traced: edits and captures are those of this layer."""

    taps: Taps
    lens: Callable | None
    layers: int
    edits: dict[int, edits_.BoundEdit]
    captures: dict[str, captures_.BoundCapture]
    receipts: dict[int, Any] = dataclasses.field(default_factory=dict)
    captured: dict[str, Any] = dataclasses.field(default_factory=dict)

    def idle(self, site: sites.Site, x: jax.ShapeDtypeStruct) -> bool:
        """Whether nobody asks for this tensor, so that it need not be made as a whole."""
        self.taps.shapes[site.name] = edits_.SiteShape(self.layers, x.shape, x.dtype)
        return not any(i.site == site for i in (*self.edits.values(), *self.captures.values()))

    def __call__(self, site: sites.Site, x: jax.Array) -> jax.Array:
        self.taps.shapes[site.name] = edits_.SiteShape(self.layers, x.shape, x.dtype)
        x = mesh.constrain(x, site.axes)
        for number, edit in self.edits.items():
            if edit.site == site:
                x = self._edit(number, edit, x)
        for name, capture in self.captures.items():
            if capture.site == site:
                self.captured[name] = self._read(capture, x)
        return x

    def _edit(self, number: int, edit: edits_.BoundEdit, x: jax.Array) -> jax.Array:
        rank, units, along = x.ndim, edits_.unit_axis(edit.site), edits_.token_axis(edit.site)
        length = x.shape[along]
        where = self._window(edit.tokens, 1, length)
        if "at" in edit.along:  # only what this pass computes can be read
            read = self._follow("at", edit.along["at"], x, along)
            where = where & (read >= 0) & (read < length)
        mask = captures_.along_tokens(where, along, rank)
        mask = mask & edit.units.reshape(*(1,) * units, -1, *(1,) * (rank - units - 1))
        values = {
            name: self._window(value, along, length) if value.ndim == rank else value
            for name, value in edit.values.items()
        }
        follow = {name: self._follow(name, array, x, along) for name, array in edit.along.items()}
        y = dataclasses.replace(edit, values=values, along=follow).apply(x, mask)
        self.receipts[number] = receipts.measure(x, y, mask, (0, along))
        return y

    def _read(self, capture: captures_.BoundCapture, x: jax.Array) -> Any:
        length = x.shape[edits_.token_axis(capture.site)]
        capture = dataclasses.replace(
            capture,
            tokens=self._window(capture.tokens, 1, length),
            kind=self._window(capture.kind, 1, length),
        )
        if capture.slots is None:
            return capture.read(x, self.lens)
        shape = jax.eval_shape(lambda: capture.read(x, self.lens))
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        asked = capture.slots < capture.count
        return jax.lax.cond(asked, lambda: capture.read(x, self.lens), lambda: nothing)

    def _follow(self, name: str, array, x: jax.Array, along: int):
        """An array that follows the tokens, as this pass counts them."""
        if name == "hidden":
            return self._keys(array, x)
        array = self._window(array, 1, x.shape[along])
        if name == "strength":
            return captures_.along_tokens(array, along, x.ndim)
        return array - self.taps.at if name == "at" else array

    def _keys(self, array, mask: jax.Array):
        """The part of an array over all tokens that the keys of an attention mask are."""
        *_, T, S = mask.shape
        return jnp.concatenate([array[:, : S - T], self._window(array, 1, T)], 1)

    def _window(self, array, axis: int, length: int):
        """The part of an array over all tokens that this pass computes."""
        if array.shape[axis] in (1, length):
            return array
        return jax.lax.dynamic_slice_in_dim(array, self.taps.at, length, axis)


class ModuleTap:
    """The taps of one module: called for the sites it has once, scanned over its layers."""

    def __init__(self, taps: Taps, name: str, lens: Callable | None):
        self.taps, self.name, self.lens = taps, name, lens
        self.edits = {i: e for i, e in enumerate(taps.edits) if e.site.module == name}
        self.captures = {n: c for n, c in taps.captures.items() if c.site.module == name}

    def __call__(self, site: sites.Site, x: jax.Array) -> jax.Array:
        tap = self._tap(1, _first(_at(self.edits, False)), _at(self.captures, False))
        x = tap(site, x)
        self.taps.receipts |= _add_axis(tap.receipts)
        self.taps.captured |= tap.captured
        return x

    def scan(self, step: Callable, layers: Any, x: jax.Array, extra: Any = None):
        """x through every layer, one compiled body.

        Args:
          step: (layer, x, tap, extra) -> (x, out). Where a pass may ask for some tokens alone, also
            `only=places` int32[B], and then x is [B, 1, D].
          layers: a module whose arrays lead with L.
          x: what enters the first layer.
          extra: further arrays that lead with L, one slice a step.

        Returns:
          x after the last layer, and the stacked outs [L, ...].
        """
        count = jax.tree.leaves(layers)[0].shape[0]
        edits, captures = _at(self.edits, True), _at(self.captures, True)
        arrays = _stacked(edits), _slots(captures)
        if self.name in self.taps.resume:
            return self._resumed(step, layers, x, extra, edits, captures, arrays, count)

        whole = jax.lax.stop_gradient((layers, extra))  # gradients go through what is scanned

        def one(sliced, x, tap, i):
            layer, more = indexing.index_without_upcast(sliced, whole, i)
            return step(layer, x, tap, more)

        def body(carry, inputs):
            x, kept = carry
            sliced, i, (edit_arrays, slots) = inputs
            tap = self._tap(count, _unstack(edits, edit_arrays), _with_slots(captures, slots))
            x, out = self._step(one)(sliced, x, tap, i)
            kept = {n: _put(kept[n], tap.captured.pop(n), slots[n]) for n in kept}
            return (x, kept), (out, (tap.receipts, tap.captured))

        kept = self._empty(step, layers, x, extra, edits, captures, count)
        inputs = (layers, extra), indexing.layer_indices(whole), arrays
        (x, kept), (out, found) = jax.lax.scan(body, (x, kept), inputs)
        self.taps.receipts |= found[0]
        self.taps.captured |= found[1] | self._carried(kept, captures)
        return x, out

    def _resumed(self, step, layers, x, extra, edits, captures, arrays, count):
        """The layers from `resume.start` on, which is data: one program for every start."""
        resume = self.taps.resume[self.name]
        x = x if resume.x is None else resume.x

        def at(i):
            whole = layers, extra
            return indexing.index_without_upcast(jax.tree.map(lambda a: a[i], whole), whole, i)

        def one(i, x):
            (layer, more), (edit_arrays, slots) = at(i), jax.tree.map(lambda a: a[i], arrays)
            tap = self._tap(count, _unstack(edits, edit_arrays), _with_slots(captures, slots))
            x, out = step(layer, x, tap, more)
            places = {name: slots.get(name, i) for name in captures}
            return x, tap.receipts, tap.captured, places, out

        def body(i, carry):
            x, receipts_, captured = carry
            x, receipt, found, places, _ = one(i, x)
            captured = {n: _put(captured[n], found[n], places[n]) for n in captured}
            return x, _put(receipts_, receipt, i), captured

        def last(x):
            layer, more = at(count - 1)
            y, _ = step(layer, x, self._tap(count, {}, {}), more, only=resume.places)
            return x.at[jnp.arange(len(x)), resume.places].set(y[:, 0])

        _, receipt, _, _, out = jax.eval_shape(one, 0, x)
        receipts_ = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), receipt)
        before = {n: _reopened(resume.captured[n], captures[n]) for n in captures}
        # The first by itself: vmap makes what comes before its edits once for all lanes.
        carry = body(resume.start, (x, receipts_, before))
        stop = count if resume.places is None else resume.stop
        x, receipts_, captured = jax.lax.fori_loop(resume.start + 1, stop, body, carry)
        if resume.places is not None:
            x = jax.lax.cond(stop < count, last, lambda x: x, x)
        kept = {n: captured.pop(n) for n in arrays[1]}
        self.taps.receipts |= receipts_
        self.taps.captured |= captured | self._carried(kept, captures)
        return x, jax.tree.map(lambda _: None, out)  # of some layers there is none

    def _step(self, step: Callable) -> Callable:
        """The step, of which a backward pass has kept the matrix products, or with remat nothing.

        The products are what costs time, all that comes between them what takes memory.
        """
        kept = jax.checkpoint_policies
        policy = kept.nothing_saveable if self.taps.remat else kept.dots_with_no_batch_dims_saveable

        def again(layer, x, tap, extra):
            # The tap collects while it is traced; what it collects must leave through the outputs.
            def pure(layer, x, extra):
                inside = dataclasses.replace(tap, receipts={}, captured={})
                out = step(layer, x, inside, extra)
                return out, inside.receipts, inside.captured

            # A scan keeps the backward pass apart by itself.
            found = jax.checkpoint(pure, policy=policy, prevent_cse=False)(layer, x, extra)
            out, tap.receipts, tap.captured = found
            return out

        return again

    def loop(self, step: Callable, layers: list, x: jax.Array) -> jax.Array:
        """As `scan`, for a few layers of unequal shape: step is (layer, x, tap) -> x."""
        edits, captures = _at(self.edits, True), _at(self.captures, True)
        arrays, slots = _stacked(edits), _slots(captures)
        kept, found = {}, []
        for i, layer in enumerate(layers):
            now = _unstack(edits, jax.tree.map(lambda a, i=i: a[i], arrays))
            here = _with_slots(captures, {name: s[i] for name, s in slots.items()})
            tap = self._tap(len(layers), now, here)
            x = step(layer, x, tap)
            for name in slots:
                value = tap.captured.pop(name)
                if name not in kept:
                    kept[name] = _room(value, captures[name].count)
                kept[name] = _put(kept[name], value, slots[name][i])
            found.append((tap.receipts, tap.captured))
        if found:
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *found)
            self.taps.receipts |= stacked[0]
            self.taps.captured |= stacked[1] | self._carried(kept, captures)
        return x

    def _tap(self, layers: int, edits: dict, captures: dict) -> Tap:
        return Tap(self.taps, self.lens, layers, edits, captures)

    def _empty(self, step, layers, x, extra, edits, captures, count):
        """Room for the captures that are carried, found by shape alone."""
        slots = _slots(captures)
        if not slots:
            return {}

        def first():
            layer, more, arrays, at = jax.tree.map(
                lambda a: a[0], (layers, extra, _stacked(edits), slots)
            )
            tap = self._tap(count, _unstack(edits, arrays), _with_slots(captures, at))
            step(layer, x, tap, more)
            return {name: tap.captured[name] for name in slots}

        return {name: _room(s, captures[name].count) for name, s in jax.eval_shape(first).items()}

    @staticmethod
    def _carried(kept, captures) -> dict[str, Any]:
        return {name: captures[name].finish(value) for name, value in kept.items()}


def _at(items: dict, stacked: bool) -> dict:
    return {key: item for key, item in items.items() if item.site.stacked == stacked}


def _stacked(edits: dict) -> dict:
    """The arrays of edits that lead with L."""
    return {i: (edit.units, edit.values) for i, edit in edits.items()}


def _unstack(edits: dict, arrays: dict) -> dict:
    """Edits with the arrays of one layer."""
    return {
        i: dataclasses.replace(edit, units=arrays[i][0], values=arrays[i][1])
        for i, edit in edits.items()
    }


def _first(edits: dict) -> dict:
    return _unstack(edits, jax.tree.map(lambda a: a[0], _stacked(edits)))


def _slots(captures: dict) -> dict:
    return {name: c.slots for name, c in captures.items() if c.slots is not None}


def _with_slots(captures: dict, slots: dict) -> dict:
    return {name: dataclasses.replace(c, slots=slots.get(name)) for name, c in captures.items()}


def _room(value: Any, count: int) -> Any:
    """Zeros for `count` layers and one place for what is not asked."""
    return jax.tree.map(lambda s: jnp.zeros((count + 1, *s.shape), s.dtype), value)


def _put(room: Any, value: Any, slot) -> Any:
    return jax.tree.map(lambda r, v: r.at[slot].set(v), room, value)


def _add_axis(tree: Any) -> Any:
    return jax.tree.map(lambda a: a[None], tree)


def _reopened(value: Any, capture: captures_.BoundCapture) -> Any:
    """What `_carried` has finished, with the place of the layers that are not asked again."""
    if capture.slots is None:
        return value
    value = _add_axis(value) if capture.single else value
    return jax.tree.map(lambda a: jnp.pad(a, ((0, 1), *((0, 0),) * (a.ndim - 1))), value)
