"""The tap of one layer: applies the edits of a site to its tensor and reads the captures.

See `mllm_jax.interventions.tap` for the taps of a whole pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax import sites
from mllm_jax.interventions import forms, receipts
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.edits import BoundEdit
from mllm_jax.interventions.reductions import expand_tokens
from mllm_jax.sharding import mesh
from mllm_jax.typing import AnyArray, Array, Bool, Int, Shaped


@dataclasses.dataclass
class LayerTap:
    """The tap of one layer while it is traced: what a network calls at each site.

    Attributes:
      shapes: The sites of the pass so far, by name, to which this layer adds its own.
      start: The position in the token masks of the first token of this pass, int32[].
      lens: A function from the module's residual to logits.
      layers: The number of layers of the module.
      edits: The edits of this layer, by number.
      captures: The captures of this layer, by name.
      receipts: The measurements of the edits, by number.
      captured: The results of the captures, by name.
      states: The states that captures carry to the next layer, by name.
      read: The tensors that splices read from an earlier site, by the number of the splice.
      carried: The arrays that cross-layer splices carry into this layer and on to the next, by
        number.
    """

    shapes: dict[str, sites.SiteShape]
    start: int | Int[Array, ""]
    lens: Callable | None
    layers: int
    edits: dict[int, BoundEdit]
    captures: dict[str, BoundCapture]
    receipts: dict[int, Any] = dataclasses.field(default_factory=dict)
    captured: dict[str, Any] = dataclasses.field(default_factory=dict)
    states: dict[str, Any] = dataclasses.field(default_factory=dict)
    read: dict[int, Array] = dataclasses.field(default_factory=dict)
    carried: dict[int, Array] = dataclasses.field(default_factory=dict)

    def emptied(self, **fields: Any) -> LayerTap:
        """Return the tap without results, and with other fields."""
        new: dict[str, Any] = {"receipts": {}, "captured": {}, "states": {}, "read": {}}
        return dataclasses.replace(self, carried=dict(self.carried), **new, **fields)

    def when(self, present: Bool[Array, ""]) -> LayerTap:
        """Return this tap for sites that only some layers have: elsewhere edits change nothing."""
        edits = {
            number: dataclasses.replace(edit, units=jnp.asarray(edit.units) & present)
            for number, edit in self.edits.items()
        }
        return dataclasses.replace(self, edits=edits)

    def idle(self, site: sites.Site, x: jax.ShapeDtypeStruct) -> bool:
        """Return whether no edit or capture needs this tensor, so that it may stay fused."""
        self.shapes[site.name] = sites.SiteShape(self.layers, x.shape, x.dtype)
        items: list[BoundEdit | BoundCapture] = [*self.edits.values(), *self.captures.values()]
        return not any(item.site == site for item in items)

    def __call__(self, site: sites.Site, x: Shaped[Array, ...]) -> Shaped[Array, ...]:
        """Return the tensor of a site with its edits applied, and read its captures."""
        self.shapes[site.name] = sites.SiteShape(self.layers, x.shape, x.dtype)
        x = mesh.constrain(x, site.axes)
        for number, edit in self.edits.items():
            if edit.site == site and edit.splice is not None:
                x = self._splice(number, edit, x)
            elif edit.site == site:
                x = self._edit(number, edit, x)
        for number, edit in self.edits.items():
            if edit.splice is not None and edit.splice.reads == site != edit.site:
                self.read[number] = x
        for name, capture in self.captures.items():
            if capture.site == site:
                if (state := forms.carry(capture, x)) is not None:
                    self.states[name] = state
                    capture = dataclasses.replace(capture, state=state)
                self.captured[name] = self._read(capture, x)
        return x

    def _edit(self, number: int, edit: BoundEdit, x: jax.Array) -> jax.Array:
        rank, units, axis = x.ndim, edit.site.unit_axis, edit.site.token_axis
        length = x.shape[axis]
        where = self._window(edit.tokens, 1, length)
        if "at" in edit.along:  # only tokens of this pass can be read
            read = self._window_along("at", edit.along["at"], x, axis)
            where = where & (read >= 0) & (read < length)
        mask = expand_tokens(where, axis, rank)
        mask = mask & edit.units.reshape(*(1,) * units, -1, *(1,) * (rank - units - 1))
        values = {
            name: self._window(value, axis, length) if value.ndim == rank else value
            for name, value in edit.values.items()
        }
        along = {
            name: self._window_along(name, array, x, axis) for name, array in edit.along.items()
        }
        y = dataclasses.replace(edit, values=values, along=along).apply(x, mask)
        self.receipts[number] = receipts.measure(x, y, mask, (0, axis))
        return y

    def _splice(self, number: int, edit: BoundEdit, x: jax.Array) -> jax.Array:
        """Apply a splice in its layer, with the edits and captures of its latents.

        Elsewhere nothing is computed: the layers of a splice are data, and the same in all lanes of
        a sweep.
        """
        assert edit.splice is not None, "a splice has a dictionary"
        splice, latents, axis = edit.splice, edit.site.latents, edit.site.token_axis
        layer = edit.values.get("layer")  # of a cross-layer transcoder
        order = [i for i, e in self.edits.items() if e.splice is not None and e.site == edit.site]
        inner = {
            i: dataclasses.replace(
                e.at_layer(order.index(number) if layer is None else layer),
                tokens=jnp.asarray(e.tokens) & edit.tokens,
            )
            for i, e in self.edits.items()
            if e.site == latents
        }
        captures = {name: c for name, c in self.captures.items() if c.site == latents}
        tokens = self._window(edit.tokens, 1, x.shape[axis])
        mask = expand_tokens(tokens, axis, x.ndim)

        def inside(x, read, carried):
            tap = self.emptied(edits=inner, captures=captures)
            y = x
            if inner or captures or not splice.error:
                before = splice.encode(read, layer)
                after = tap(latents, before)
                if inner or not splice.error:
                    new, carried = splice.apply(x, read, before, after, layer, carried)
                    y = jnp.where(mask, new, x)
            tap.receipts[number] = receipts.measure(x, y, mask, (0, axis))
            return y, carried, tap.receipts, tap.captured

        args = x, x if splice.reads == edit.site else self.read[number], self.carried.get(number)
        _, _, *shapes = jax.eval_shape(inside, *args)
        # Another splice of this site may be in this layer and have produced these results.
        results = _or_zeros(self.receipts, shapes[0]), _or_zeros(self.captured, shapes[1])

        def outside(x, read, carried):
            return x, carried, *results

        is_here = jnp.asarray(edit.units).any()
        y, carried, receipt, captured = jax.lax.cond(is_here, inside, outside, *args)
        if number in self.carried:
            self.carried[number] = carried
        self.receipts |= receipt
        self.captured |= captured
        return y

    def _read(self, capture: BoundCapture, x: jax.Array) -> Any:
        length = x.shape[capture.site.token_axis]
        capture = capture.map_tokens(lambda array: self._window(array, 1, length))
        read = functools.partial(forms.read_layer, capture, x, self.lens)
        if capture.slots is None:
            return read()
        zeros = _zeros(jax.eval_shape(read))
        is_captured = capture.slots < capture.count
        return jax.lax.cond(is_captured, read, lambda: zeros)

    def _window_along(self, name: str, array: AnyArray, x: jax.Array, axis: int) -> AnyArray:
        """Return the part of an array of `BoundEdit.along` that this pass computes."""
        if name == "hidden":
            return self._keys(array, x)
        array = self._window(array, 1, x.shape[axis])
        if name == "strength":
            return expand_tokens(array, axis, x.ndim)
        return array - self.start if name == "at" else array

    def _keys(self, array: AnyArray, mask: Bool[Array, "B N T S"]) -> Array:
        """Return the part of an array over all tokens that belongs to the keys of a mask."""
        *_, T, S = mask.shape
        return jnp.concatenate([array[:, : S - T], self._window(array, 1, T)], 1)

    def _window(self, array: AnyArray, axis: int, length: int) -> AnyArray:
        """Return the part of an array over all tokens that this pass computes."""
        if array.shape[axis] in (1, length):
            return array
        return jax.lax.dynamic_slice_in_dim(array, self.start, length, axis)


def _or_zeros(results: dict[Any, Any], shapes: dict[Any, Any]) -> dict[Any, Any]:
    """Return the results of these names; zeros if there are none yet."""
    return {name: results.get(name, zero) for name, zero in _zeros(shapes).items()}


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
