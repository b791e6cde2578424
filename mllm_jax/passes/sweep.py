"""Sweeps: many edits of one structure on one batch, in parallel lanes of one program.

What no edit of the sweep reaches is computed once for all lanes, in a clean pass before them, or
not at all:

* the vision tower, when no edit is in it;
* the layers below the first edited one: lanes are ordered by that layer and each chunk goes on
  from the state that enters its lowest. Where it goes on is data, so that one program serves
  every chunk;
* the last layer, where no edit is in it and the logits of the last token alone are asked: all but
  that token;
* the keys and values of the tokens before the first that an edit or capture reaches, such as
  those of the picture when the text alone is edited. Lanes with one such prefix share a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import BoundEdit, Edits, SiteShape
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes import clean_pass as trunk_
from mllm_jax.passes import run as run_
from mllm_jax.passes.run import Out
from mllm_jax.sharding import hosts, mesh
from mllm_jax.store import Store, fingerprint, refusal

BUDGET = 2**30  # bytes of one layer's widest tensor over all lanes of a chunk


@dataclasses.dataclass(frozen=True)
class Stack:
    """Edits to be swept over: the same kinds and sites in each; what else is data may differ."""

    items: tuple[Edits, ...]

    def __len__(self) -> int:
        return len(self.items)


def stack(edits: Sequence[Edits]) -> Stack:
    """Edits to be swept over.

    Raises:
      ValueError: none are given, or they differ in kinds or sites, in the functions or arguments
        of a `call`, or in that a `patch` has a basis.
    """
    items = tuple(edits)
    if not items:
        raise ValueError("there is no edit to sweep over")
    for number, item in enumerate(items):
        if _structure(item) != _structure(items[0]):
            raise ValueError(
                f"edit {number} of the sweep is {_kinds(item)}, the first is {_kinds(items[0])}: "
                "the edits of one sweep have the same kinds and sites, the same function in a call "
                "and a basis in each patch or in none (np.eye(width) is the whole space)"
            )
    return Stack(items)


def _structure(edits: Edits) -> list[tuple]:
    """What all lanes have in common, beside what `_equal_lanes` makes equal."""
    return [(edit.kind, edit.address.site, edit.fn, sorted(edit.values)) for edit in edits]


def _kinds(edits: Edits) -> str:
    def one(edit):
        name = f" {getattr(edit.fn, '__name__', edit.fn)}" if edit.fn else ""
        given = f" ({', '.join(sorted(edit.values))})" if edit.kind in ("patch", "call") else ""
        return f"{edit.kind} {edit.address.site.name}{name}{given if edit.values else ''}"

    return " >> ".join(map(one, edits))


def sweep(
    metric: Callable[[Out], Any],
    model,
    batch,
    edits: Stack | Sequence[Edits],
    captures: dict[str, Capture] | None = None,
    *,
    logits: str = "last",
    chunk: int | None = None,
    share: bool = True,
    save: str | pathlib.Path | None = None,
    restart: bool = False,
    label: str = "sweep",
) -> Any:
    """`metric(run(model, batch, edit, captures))` for each edit, stacked: [R, ...] on the host.

    Args:
      metric: of one pass, such as `lambda out: out.logits[:, token]`. Pure; one function is one
        program, so define it once, and give it the arrays that vary by batch as
        `jax.tree_util.Partial(metric, ids=...)`.
      edits: see `stack`.
      captures, logits: as in `run`.
      chunk: lanes at one time; by default the power of two that computes the fewest layers and
        tokens, of those that keep the widest tensor of a layer under BUDGET bytes. A chunk is
        taken to cost one lane more than it has.
      share: whether what is clean is computed once; False runs each lane whole.
      save: an .npz file that finished rows are written to, with fingerprints of all that they
        depend on; a killed sweep continues from it, also with further edits after these.
      restart: remove what is saved there.
      label: of the progress bar.

    Raises:
      ValueError: an edit does not fit; or `save` holds rows of another metric (its code, or the
        arrays given to it), model, batch, other captures or edits, of more edits, or is damaged.
    """
    edits = edits if isinstance(edits, Stack) else stack(edits)
    metric = metric if isinstance(metric, jax.tree_util.Partial) else jax.tree_util.Partial(metric)
    batch = batch.replace(processor=None)
    store = Store(
        save, restart=restart, model=model, data=batch, captures=captures,
        code={"metric": metric}, settings={"logits": logits},
    )  # fmt: skip
    rows = _Rows(edits.items, store)
    every = Edits(tuple(edit for item in edits.items for edit in item))
    batch = run_.separate(model, batch, every)
    bound = [run_.bind(model, batch, item, None, logits)[0] for item in edits.items]
    asked = run_.bind(model, batch, None, captures, logits)[1]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((bound, asked, batch))):
        raise ValueError("a sweep loops on the host: inside jit, vmap or grad use jax.vmap of run")
    bound = _equal_lanes(bound)
    with mesh.use_mesh_of(model):
        share = share and not rows.done.all()  # nothing is run for rows that are there
        trunk = (trunk_.compute_clean_pass if share else trunk_.without_sharing)(
            model, batch, bound, asked, logits
        )
        ways = mesh.shard_count("R")  # as many lanes in each
        chunk = min(chunk or _chunk(trunk, run_.site_shapes(model, batch), ways), len(bound))
        chunk = mesh.round_up_to_shards("R", chunk)
        widths = _common_shapes(bound)

        def program(numbers):
            lanes = _stacked(widths, [bound[i] for i in np.resize(numbers, chunk)])
            prefix = int(trunk.prefix[numbers[0]])
            resume, past = trunk.resume(numbers)
            return functools.partial(
                _lanes, metric, model, trunk.batch, lanes, asked, resume, past,
                logits=logits, prefix=prefix,
            )  # fmt: skip

        rows.begin(jax.eval_shape(program(np.arange(1))))
        chunks = [numbers for numbers in trunk.chunks(chunk) if not rows.done[numbers].all()]
        left = sum(len(numbers) for numbers in chunks)
        with tqdm.tqdm(
            total=len(bound), initial=len(bound) - left, desc=label, leave=False,
            disable=len(chunks) < 2,
        ) as bar:  # fmt: skip
            for numbers in chunks:
                rows.write(numbers, mesh.gather_to_host(program(numbers)()))
                bar.update(len(numbers))
                if hosts.preemption_requested():
                    hosts.exit_preempted(label)
    return rows.values


def _equal_lanes(lanes: list[tuple[BoundEdit, ...]]) -> list[tuple[BoundEdit, ...]]:
    """Lanes of one structure: a strength in each, if in one, and bases of one width.

    A strength of 1 is the edit, and columns of zeros add nothing to an orthonormal basis.
    """
    columns = [_equal(column) for column in zip(*lanes, strict=True)]
    return list(zip(*columns, strict=True)) if columns else lanes


def _equal(edits: tuple[BoundEdit, ...]) -> list[BoundEdit]:
    """One edit of each lane."""
    strengths = [edit.along["strength"] for edit in edits if "strength" in edit.along]
    ranks = [edit.values["basis"].shape[-1] for edit in edits if "basis" in edit.values]

    def one(edit):
        along, values = dict(edit.along), dict(edit.values)
        if strengths:
            along.setdefault("strength", np.ones_like(strengths[0]))
        if ranks:
            missing = max(ranks) - values["basis"].shape[-1]
            values["basis"] = np.pad(values["basis"], ((0, 0), (0, 0), (0, missing)))
        return dataclasses.replace(edit, along=along, values=values)

    return [one(edit) for edit in edits]


def _stacked(widths: Any, lanes: Sequence[tuple[BoundEdit, ...]]) -> tuple[BoundEdit, ...]:
    """The edits of these lanes as one, each array with a leading R axis."""
    return jax.tree.map(
        lambda shape, *leaves: np.stack([np.broadcast_to(leaf, shape) for leaf in leaves]),
        widths, *lanes, is_leaf=_is_shape,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("logits", "prefix"))
def _lanes(metric, model, batch, lanes, captures, resume, past, *, logits, prefix):
    def lane(edits, metric, model, batch, captures, resume, past):
        taps = Taps(edits, captures, resume=resume, at=prefix)
        if past is None:
            scores, _ = run_.forward(model, batch, taps, logits)
        else:
            rest = (a[:, prefix:] for a in (batch.position, batch.valid))
            x, _ = model.read(resume["lm"].x, *rest, taps, past)
            x = jnp.pad(x, ((0, 0), (prefix, 0), (0, 0)))  # places are counted from the first token
            scores = run_.at_last(model, batch, x, taps) if logits == "last" else None
        return metric(Out(scores, taps.captured, taps.receipt_list()))

    shared = metric, model, batch, captures, resume, past
    every = jax.vmap(lane, in_axes=(0, *(None for _ in shared)))
    return mesh.map_lanes(every, lanes, *shared)


def _common_shapes(bound: list[tuple[BoundEdit, ...]]) -> Any:
    """The shape of each array over all lanes; masks that differ (all units) are spread."""
    return jax.tree.map(
        lambda *leaves: np.broadcast_shapes(*(np.shape(leaf) for leaf in leaves)), *bound
    )


def _is_shape(node) -> bool:
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def _chunk(trunk: trunk_.CleanPass, shapes: dict[str, SiteShape], ways: int) -> int:
    """Lanes at one time: a power of two within BUDGET for each of `ways` parts, see `sweep`."""
    sizes = {name: np.prod(s.shape) * np.dtype(s.dtype).itemsize for name, s in shapes.items()}
    widest = int(max(size for name, size in sizes.items() if name != "logits"))
    most = max(1, min(BUDGET // widest, -(-len(trunk.first) // ways)))
    sizes = (ways * 2**i for i in range(most.bit_length()))
    return min(sizes, key=lambda n: (trunk.cost(n), -n))


class _Rows:
    """The results of the lanes, filled in any order and kept on disk if asked."""

    def __init__(self, edits: Sequence[Edits], store: Store):
        self.values, self.done = None, np.zeros(len(edits), bool)
        self._store, self._kept = store, store.read()
        if store.path is not None:
            self._edits = np.array([fingerprint(item) for item in edits])
        if self._kept is not None:
            self._check(self._kept["edits"])
            self.done[: len(self._kept["done"])] = self._kept["done"]

    def _check(self, kept: np.ndarray) -> None:
        """The edits of the rows that are kept are these, or the first of these."""
        if not np.array_equal(kept[: len(self._edits)], self._edits[: len(kept)]):
            raise refusal(self._store.path, ["edits"])
        if len(kept) > len(self._edits):
            raise refusal(self._store.path, [f"edits ({len(kept)} there, {len(self._edits)} now)"])

    def begin(self, shape: Any) -> None:
        """Makes room for the rows, of this shape but for their number, and fills in those kept."""
        count = len(self.done)
        self.values = jax.tree.map(lambda s: np.zeros((count, *s.shape[1:]), s.dtype), shape)
        if self._kept is not None:
            for i, leaf in enumerate(jax.tree.leaves(self.values)):
                leaf[: len(self._kept["done"])] = self._kept[str(i)]

    def write(self, numbers: np.ndarray, found: Any) -> None:
        def put(all_, some):
            all_[numbers] = np.asarray(some)[: len(numbers)]

        jax.tree.map(put, self.values, found)
        self.done[numbers] = True
        if self._store.path is not None:
            arrays = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self.values))}
            self._store.write({"done": self.done, "edits": self._edits, **arrays})
