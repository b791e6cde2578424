"""Sweeps: many edits of one structure on one batch, in parallel lanes of one program.

What no edit of the sweep reaches is computed once for all lanes: vmap leaves the vision tower and
the projector unbatched where they are untouched, and the layers of the LM below the first edited
one are scanned before the lanes part. That layer is rounded down to a multiple of BUCKET, so that
sweeps over layers share a few programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mllm_jax.interventions import run as run_
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import BoundEdit, Edits, SiteShape
from mllm_jax.interventions.run import Out
from mllm_jax.interventions.tap import Taps

BUCKET = 4  # layers
BUDGET = 2**30  # bytes of one layer's tensors over all lanes of a chunk


@dataclasses.dataclass(frozen=True)
class Stack:
    """Edits to be swept over: the same kinds and sites in each; all else may differ."""

    items: tuple[Edits, ...]

    def __len__(self) -> int:
        return len(self.items)


def stack(edits: Sequence[Edits]) -> Stack:
    """Edits to be swept over.

    Raises:
      ValueError: none are given, or they differ in kinds or sites.
    """
    items = tuple(edits)
    if not items:
        raise ValueError("there is no edit to sweep over")
    for number, item in enumerate(items):
        if _kinds(item) != _kinds(items[0]):
            raise ValueError(
                f"edit {number} of the sweep is {_kinds(item)}, the first is {_kinds(items[0])}: "
                "the edits of one sweep have the same kinds and sites"
            )
    return Stack(items)


def _kinds(edits: Edits) -> str:
    return " >> ".join(f"{edit.kind} {edit.address.site.name}" for edit in edits)


def sweep(
    metric: Callable[[Out], Any],
    model,
    batch,
    edits: Stack | Sequence[Edits],
    captures: dict[str, Capture] | None = None,
    *,
    logits: str = "last",
    chunk: int | None = None,
    label: str = "sweep",
) -> Any:
    """`metric(run(model, batch, edit, captures))` for each edit, stacked: [R, ...].

    Args:
      metric: of one pass, such as `lambda out: out.logits[:, token]`. Pure; one function is one
        program, so define it once.
      edits: see `stack`.
      captures, logits: as in `run`.
      chunk: lanes at one time; by default as many as keep the widest tensor of a layer under
        BUDGET bytes.
      label: of the progress bar.
    """
    edits = edits if isinstance(edits, Stack) else stack(edits)
    batch = batch.replace(processor=None)
    bound = [run_.bind(model, batch, item, None)[0] for item in edits.items]
    asked = run_.bind(model, batch, None, captures)[1]
    lanes = _lanes(bound)
    clean = _clean(bound)
    chunk = min(len(edits), chunk or _chunk(run_.site_shapes(model, batch)))
    rows = []
    with tqdm.tqdm(total=len(edits), desc=label, leave=False, disable=chunk >= len(edits)) as bar:
        for start in range(0, len(edits), chunk):
            some = jax.tree.map(lambda a, s=start: _take(a, s, chunk), lanes)
            found = _sweep(model, batch, some, asked, metric=metric, clean=clean, logits=logits)
            rows.append(jax.tree.map(lambda a, s=start: a[: len(edits) - s], found))
            bar.update(min(chunk, len(edits) - start))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


@functools.partial(jax.jit, static_argnames=("metric", "clean", "logits"))
def _sweep(model, batch, lanes, captures, *, metric, clean, logits):
    def lane(edits):
        taps = Taps(edits, captures, clean=dict(clean))
        scores, _ = run_.forward(model, batch, taps, logits)
        return metric(Out(scores, taps.captured, taps.receipt_list()))

    return jax.vmap(lane)(lanes)


def _lanes(bound: list[tuple[BoundEdit, ...]]) -> tuple[BoundEdit, ...]:
    """Bound edits with a leading R axis; masks that differ in shape (all units) are spread."""

    def join(*leaves):
        shape = np.broadcast_shapes(*(np.shape(leaf) for leaf in leaves))
        traced = any(isinstance(leaf, jax.Array) for leaf in leaves)
        xp = jnp if traced else np
        return xp.stack([xp.broadcast_to(leaf, shape) for leaf in leaves])

    return jax.tree.map(join, *bound)


def _take(array, start: int, count: int):
    """`count` lanes from `start` on; the last one again where there are no more."""
    at = np.minimum(np.arange(start, start + count), len(array) - 1)
    return array[at]


def _clean(bound: list[tuple[BoundEdit, ...]]) -> tuple[tuple[str, int], ...]:
    """(module, layers that no edit reaches), where the masks are known."""
    first: dict[str, int] = {}
    for edits in bound:
        for edit in edits:
            module = edit.site.module
            layers = [0]
            if edit.site.stacked and isinstance(edit.units, np.ndarray):
                layers = np.flatnonzero(edit.units.any(-1))
            if edit.site.stacked:
                first[module] = min(first.get(module, 2**30), int(layers[0]))
    return tuple((name, at // BUCKET * BUCKET) for name, at in sorted(first.items()))


def _chunk(shapes: dict[str, SiteShape]) -> int:
    sizes = {name: np.prod(s.shape) * np.dtype(s.dtype).itemsize for name, s in shapes.items()}
    return max(1, BUDGET // int(max(size for name, size in sizes.items() if name != "logits")))
