"""One forward pass: a pure function of (model, batch, edits), and what was asked of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, sites
from mllm_jax.interventions import binding
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions import finite as finite_
from mllm_jax.interventions.captures import BoundCapture, Capture
from mllm_jax.interventions.edits import BoundEdit, Edits, SiteShape
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.tap import Taps
from mllm_jax.sharding import mesh

LOGITS = ("last", "all", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Out:
    """What a pass brings back.

    Attributes:
      logits: float32[B, V] at each row's last token; [B, T, V] for "all"; None for "none".
      captures: by name; `out["name"]` for short.
      receipts: one for each edit, in order.
      finite: with `check_finite`, whether each site is, by name: bool[L], or bool[] of a site
        without layers. See `finite.first_not_finite`.
    """

    logits: Any
    captures: dict[str, Any]
    receipts: tuple[Receipt, ...]
    finite: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self.captures:
            known = ", ".join(self.captures) or "none"
            raise KeyError(f"no capture '{name}'; this pass has: {known}")
        return self.captures[name]

    def _repr_html_(self) -> str:
        """As a notebook shows it: what the edits did, and what was brought back."""
        brought = {"logits": self.logits} | self.captures
        leaves = [
            (name + jax.tree_util.keystr(path), list(leaf.shape), leaf.dtype)
            for name, value in brought.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
        ]
        arrays = notebook.table(("array", "shape", "type"), leaves)
        return (notebook.receipts(self.receipts) if self.receipts else "") + arrays


def run(
    model,
    batch,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
    *,
    logits: str = "last",
    remat: bool = False,
    check_finite: bool = False,
) -> Out:
    """One forward pass.

    Pure: it can stand inside `jax.jit`, `vmap` and `grad`. Called on its own, it compiles once
    per structure and keeps the program.

    Args:
      model: a network with sites. batch: what it reads.
      edits: what to change. captures: what to bring back, by name.
      logits: "last" at each row's last token, "all", or "none".
      remat: compute a layer's tensors again in the backward pass instead of keeping them.
      check_finite: look at every site for NaN and infinities, padding apart, and name the first.
        Inside `jax.jit` no error can be raised: there `Out.finite` comes back to be looked at.

    Raises:
      ValueError: an edit or capture that does not fit, or that selects nothing; with
        `check_finite`, a site that is not finite.
    """
    if logits not in LOGITS:
        raise ValueError(f'logits="{logits}" is none of {", ".join(LOGITS)}')
    batch = separate(model, batch.replace(processor=None), edits)
    if check_finite:
        captures = (captures or {}) | finite_.captures(site_shapes(model, batch), logits)
    bound, asked = bind(model, batch, edits, captures, logits)
    with mesh.use_mesh_of(model):
        read = mesh.shard_batch(batch), place(bound), asked
        out = mesh.gather_to_host(_run(model, *read, logits=logits, remat=remat))
    if not check_finite:
        return out
    found, checks = finite_.split(out.captures)
    finite_.require(checks)
    return dataclasses.replace(out, captures=found, finite=checks)


def bind(
    model, batch, edits, captures, logits: str = "all"
) -> tuple[tuple[BoundEdit, ...], dict[str, BoundCapture]]:
    """Edits and captures in the shapes of this model and batch. See `binding.bind`.

    Args:
      logits: those that the pass computes, as in `run`.
    """
    if not edits and not captures:
        return (), {}
    shapes, maps = site_shapes(model, batch), model.token_maps(batch)
    bound, asked = binding.bind(edits, shapes, maps), captures_.bind(captures, shapes, maps)
    if logits == "last":
        items = (*bound, *asked.values())
        binding.refuse_uncomputed(items, batch.last, batch.ids.shape[1])
    return bound, asked


def separate(model, batch, edits: Edits | None):
    """The batch in which rows share no pictures, where a patch writes those of a row."""
    tiles = any(e.kind == "patch" and "I" in e.address.site.axes for e in edits or ())
    return model.unshared(batch) if tiles else batch


def place(
    bound: tuple[BoundEdit, ...], put: Callable[[Any, tuple], Any] = mesh.shard
) -> tuple[BoundEdit, ...]:
    """Edits of which each device holds what its part of the site needs; see `mesh.place`."""
    return tuple(_placed(edit, put) for edit in bound)


def _placed(edit: BoundEdit, put: Callable[[Any, tuple], Any]) -> BoundEdit:
    site = edit.site
    full, rows = ("L", *site.axes), (site.axes[0], None)

    def value(array):
        return put(array, full if array.ndim == len(full) else (None,) * array.ndim)

    return dataclasses.replace(
        edit,
        units=put(edit.units, ("L", site.axes[edits_.unit_axis(site)])),
        tokens=put(edit.tokens, rows),
        values=jax.tree.map(value, edit.values),
        along=jax.tree.map(lambda array: put(array, rows), edit.along),
    )


def forward(model, batch, taps: Taps, logits: str = "last"):
    """The pass itself, while it is traced: logits, and the cache of every token."""
    x, cache = model(batch, taps)
    if logits == "none":
        if any(i.site == sites.logits for i in (*taps.edits, *taps.captures.values())):
            raise ValueError('this pass computes no logits to edit or capture: logits="none"')
        return None, cache
    if logits == "all":
        return model.logits(x, taps), cache
    return at_last(model, batch, x, taps), cache


def at_last(model, batch, x, taps: Taps):
    """float32[B, V]: logits at each row's last token."""
    last = jnp.take_along_axis(x, batch.last[:, None, None], 1)
    return model.logits(last, _moved(taps, batch))[:, 0]


def _moved(taps: Taps, batch) -> Taps:
    """The taps with the masks of the logits site at each row's last token only."""

    def pick(array):  # [B, T]
        return jnp.take_along_axis(jnp.asarray(array), batch.last[:, None], 1)

    def value(array):  # [1, B, T, V], or without tokens
        if array.ndim < 4 or array.shape[2] == 1:
            return array
        return jnp.take_along_axis(jnp.asarray(array), batch.last[None, :, None, None], 2)

    def edit(item):
        if item.site != sites.logits:
            return item
        tokens, along = pick(item.tokens), jax.tree.map(pick, item.along)
        if "at" in along:  # it reads the last token of a row, or nothing that is computed
            tokens = tokens & (along["at"] == jnp.take(batch.last, along["row"]))
            along["at"] = jnp.full_like(along["at"], taps.at)
        values = jax.tree.map(value, item.values)
        return dataclasses.replace(item, tokens=tokens, values=values, along=along)

    def capture(item):
        if item.site != sites.logits:
            return item
        return dataclasses.replace(item, tokens=pick(item.tokens), kind=pick(item.kind))

    taps.edits = tuple(edit(item) for item in taps.edits)
    taps.captures = {name: capture(item) for name, item in taps.captures.items()}
    return taps


@functools.partial(jax.jit, static_argnames=("logits", "remat"))
def _run(model, batch, edits, captures, *, logits, remat) -> Out:
    taps = Taps(edits, captures, remat=remat)
    scores, _ = forward(model, batch, taps, logits)
    return Out(scores, taps.captured, taps.receipt_list())


_SHAPES: dict[Any, dict[str, SiteShape]] = {}


def site_shapes(model, batch) -> dict[str, SiteShape]:
    """The sites that a pass of this batch runs through, found without computing anything."""
    key = (
        jax.tree.structure((model, batch)),
        tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves((model, batch))),
    )
    if key not in _SHAPES:
        taps = Taps()
        jax.eval_shape(lambda m, b: forward(m, b, taps, "all")[0], model, batch)
        _SHAPES[key] = taps.shapes
    return _SHAPES[key]
