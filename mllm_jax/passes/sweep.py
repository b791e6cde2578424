"""Sweeps: many edits of one structure on one batch, in parallel lanes of one program.

Work that no edit of the sweep affects is done once for all lanes, in a clean pass before them, or
not at all:

* The vision tower, if no edit is in it.
* The layers below the first edited one: lanes are sorted by that layer, and each chunk resumes from
  the input of its lowest edited layer. The point of resumption is data, so that one program serves
  every chunk.
* The last layer, if no edit is in it and only the logits of the last token are needed: it runs only
  for that token.
* The keys and values of the tokens before the first that an edit or capture selects, such as those
  of the picture if only the text is edited. Lanes in a chunk have the same prefix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mllm_jax.arguments import require_whole, type_error
from mllm_jax.batch import Batch
from mllm_jax.interventions import binding, finite
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import BoundEdit, Edit, Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Resume, Taps
from mllm_jax.models.cache import Cache
from mllm_jax.passes import arguments, clean_pass
from mllm_jax.passes.clean_pass import CleanPass, Lane
from mllm_jax.passes.run import (
    Logits,
    Out,
    check_logits,
    forward,
    logits_at_last,
    unshare_patched,
)
from mllm_jax.sharding import hosts, memory, mesh
from mllm_jax.sites import SiteShape
from mllm_jax.store import Store, fingerprint, mismatch_error
from mllm_jax.typing import Int

Splices = dict[int, BoundEdit]
BUDGET = 2**30  # bytes of one layer's widest tensor over all lanes of a chunk; see `lane_budget`
PART = 8  # that tensor takes 1 / PART of a device's free memory, because several live at a time


@dataclasses.dataclass(frozen=True)
class Stack:
    """Edits to sweep over. Their kinds and sites are the same; all data may differ.

    Attributes:
      items: The edits of each lane.
    """

    items: tuple[Edits, ...]

    def __len__(self) -> int:
        return len(self.items)


def stack(edits: Sequence[Edits]) -> Stack:
    """Stack edits to sweep over them.

    Args:
      edits: The edits of each lane.

    Raises:
      ValueError: There are no edits; or they differ in kinds or sites, in the function or the
        arguments of a `call`, or in whether a `patch` has a basis.
    """
    if isinstance(edits, Edits | str) or not isinstance(edits, Iterable):
        raise type_error("edits", edits, "a list of the edits to sweep over: [first, second]")
    items = tuple(edits)
    for item in items:
        arguments.check_edits(item)
    if not items:
        raise ValueError("there is no edit to sweep over")
    structure = _structure(items[0])
    for number, item in enumerate(items):
        if _structure(item) != structure:
            raise ValueError(
                f"edit {number} of the sweep is {_kinds(item)}, the first is {_kinds(items[0])}: "
                "the edits of one sweep need the same kinds and sites, the same function in a "
                "call, a basis in each patch or in none (np.eye(width) is the whole space), and "
                "the same dictionary in each splice, at one layer"
            )
    return Stack(items)


def _structure(edits: Edits) -> list[tuple]:
    """Return the structure that all lanes must share; `_equalise_lanes` makes the rest equal."""

    def splice(edit: Edit) -> tuple | None:
        if edit.splice is None:
            return None
        leaves, structure = jax.tree.flatten((edit.splice, edit.address.layers))
        dictionary = jax.tree.leaves(edit.splice)
        others = leaves[len(dictionary) :]  # the layer, which is compared by value
        return structure, *map(id, dictionary), *map(int, others)

    return [(e.kind, e.address.site, e.fn, sorted(e.values), splice(e)) for e in edits]


def _kinds(edits: Edits) -> str:
    def describe(edit: Edit) -> str:
        name = f" {getattr(edit.fn, '__name__', edit.fn)}" if edit.fn else ""
        given = f" ({', '.join(sorted(edit.values))})" if edit.kind in ("patch", "call") else ""
        return f"{edit.kind} {edit.address.site.name}{name}{given if edit.values else ''}"

    return " >> ".join(map(describe, edits))


def sweep(
    metric: Callable[[Out], Any],
    model: Model,
    batch: Batch,
    edits: Stack | Sequence[Edits],
    captures: dict[str, Capture] | None = None,
    *,
    logits: Logits = "last",
    chunk: int | None = None,
    share: bool = True,
    check_finite: bool = False,
    save: str | pathlib.Path | None = None,
    restart: bool = False,
    label: str = "sweep",
) -> Any:
    """Compute `metric(run(model, batch, edit, captures))` for each edit.

    Args:
      metric: A pure function of one pass, such as `lambda out: out.logits[:, token]`. Each function
        compiles a new program, so define it once, and give it the arrays that vary by batch as
        `jax.tree_util.Partial(metric, ids=...)`.
      model: See `run`.
      batch: See `run`.
      edits: See `stack`.
      captures: See `run`.
      logits: See `run`.
      chunk: The number of lanes that run at one time; by default, among the powers of two that keep
        the widest tensor of a layer within `lane_budget`, the one that computes the fewest layers
        and tokens, where each chunk counts as one additional lane.
      share: Whether clean work is done once; False runs every lane in full.
      check_finite: Whether to check every site of every lane for NaN and infinities, as `run` does,
        and report the first. No lane then skips tokens.
      save: An .npz file for finished rows, with fingerprints of everything that they depend on; a
        killed sweep continues from it, also with further edits at the end.
      restart: Whether to remove saved results.
      label: The label of the progress bar.

    Returns:
      The metrics, stacked: [R, ...] on the host.

    Raises:
      ValueError: An edit does not fit; with `check_finite`, a site is not finite; or `save` is
        damaged or holds rows of another metric (its code or its bound arrays), model, batch, other
        captures or edits, or of more edits.
    """
    if not callable(metric):
        raise type_error("metric", metric, "a function of the results of a pass")
    arguments.check(model, batch, None, captures)
    check_logits(logits, batch)
    chunk = None if chunk is None else require_whole("chunk", chunk)
    edits = edits if isinstance(edits, Stack) else stack(edits)
    metric = arguments.as_partial(metric)
    batch = batch.replace(processor=None)
    store = Store(
        save, restart=restart, model=model, data=batch, captures=captures,
        code={"metric": metric},
        settings={"logits": logits} | ({"check_finite": True} if check_finite else {}),
    )  # fmt: skip
    rows = _Rows(edits.items, store)
    all_edits = Edits(tuple(edit for item in edits.items for edit in item))
    batch = unshare_patched(model, batch, all_edits)
    if check_finite:
        captures = (captures or {}) | finite.captures(site_shapes(model, batch), logits)
        metric = jax.tree_util.Partial(_metric_and_checks, metric=metric)
    lanes = [binding.bind(model, batch, item, None, logits)[0] for item in edits.items]
    splices = binding.splices(edits.items[0])
    bound_captures = binding.bind(model, batch, splices, captures, logits)[1]
    leaves = jax.tree.leaves((lanes, bound_captures, batch))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "a sweep loops on the host: inside jit, vmap or grad use jax.vmap over run"
        )
    with mesh.use_mesh_of(model):
        share = share and not rows.done.all()  # nothing runs for rows that are finished
        _run_chunks(
            metric, model, batch, _equalise_lanes(lanes), bound_captures, rows,
            logits=logits, chunk=chunk, share=share, label=label,
        )  # fmt: skip
    if not check_finite:
        return rows.values
    values, checks = rows.values
    for number in range(len(lanes)):
        of = f"edit {number} of the sweep"
        finite.require({name: ok[number] for name, ok in checks.items()}, of)
    return values


def _metric_and_checks(out: Out, metric: Callable[[Out], Any]) -> tuple[Any, dict[str, Any]]:
    """Return the metric of a pass, and whether each site of it is finite."""
    captured, checks = finite.separate(out.captures)
    return metric(dataclasses.replace(out, captures=captured, finite=checks)), checks


def _run_chunks(
    metric: Callable[[Out], Any],
    model: Model,
    batch: Batch,
    lanes: list[Lane],
    captures: dict[str, BoundCapture],
    rows: _Rows,
    *,
    logits: Logits,
    chunk: int | None,
    share: bool,
    label: str,
) -> None:
    """Run the lanes in chunks and write their metrics to `rows`."""
    splices, own = separate_splices(lanes)  # first, as it may refuse the lanes
    compute = clean_pass.compute_clean_pass if share else clean_pass.without_sharing
    clean = compute(model, batch, lanes, captures, logits)
    shards = mesh.shard_count("R")  # each shard runs equally many lanes
    if chunk is None:
        widest = _widest(site_shapes(model, batch), splices)
        chunk = _chunk_size(clean, widest, shards, lane_budget(model))
    chunk = min(chunk, len(lanes))
    chunk = mesh.round_up_to_shards("R", chunk)
    shapes = _common_shapes(own)

    def program(numbers):
        stacked = _stack_lanes(shapes, [own[i] for i in np.resize(numbers, chunk)])
        resume, past = clean.resume(numbers)
        return functools.partial(
            compiled_lanes, metric, model, clean.batch, splices, stacked, captures, resume, past,
            logits=logits, prefix=int(clean.prefix[numbers[0]]),
        )  # fmt: skip

    rows.allocate(jax.eval_shape(program(np.arange(1))))
    chunks = [numbers for numbers in clean.chunks(chunk) if not rows.done[numbers].all()]
    left = sum(len(numbers) for numbers in chunks)
    with tqdm.tqdm(
        total=len(lanes), initial=len(lanes) - left, desc=label, leave=False,
        disable=len(chunks) < 2,
    ) as bar:  # fmt: skip

        def finish(numbers: Int[np.ndarray, " n"], metrics: Any) -> None:
            rows.write(numbers, mesh.gather_to_host(metrics))
            bar.update(len(numbers))
            if hosts.preemption_requested():
                hosts.exit_preempted(label)

        running: tuple[Int[np.ndarray, " n"], Any] | None = None
        for numbers in chunks:
            run = program(numbers)  # stacks its lanes while the device runs those before
            if running is not None:
                finish(*running)
            running = numbers, run()
        if running is not None:
            finish(*running)


def _equalise_lanes(lanes: list[Lane]) -> list[Lane]:
    """Return lanes of one structure: a strength in each, if in one, and bases of one width.

    A strength of 1 is the plain edit, and columns of zeros add nothing to an orthonormal basis.
    """
    columns = [_equalise(column) for column in zip(*lanes, strict=True)]
    return list(zip(*columns, strict=True)) if columns else lanes


def _equalise(edits: tuple[BoundEdit, ...]) -> list[BoundEdit]:
    """Give one structure to an edit of each lane."""
    strengths = [edit.along["strength"] for edit in edits if "strength" in edit.along]
    ranks = [edit.values["basis"].shape[-1] for edit in edits if "basis" in edit.values]

    def equalise(edit: BoundEdit) -> BoundEdit:
        along, values = dict(edit.along), dict(edit.values)
        if strengths:
            along.setdefault("strength", np.ones_like(strengths[0]))
        if ranks:
            missing = max(ranks) - values["basis"].shape[-1]
            values["basis"] = np.pad(values["basis"], ((0, 0), (0, 0), (0, missing)))
        return dataclasses.replace(edit, along=along, values=values)

    return [equalise(edit) for edit in edits]


def separate_splices(lanes: list[Lane]) -> tuple[Splices, list[Lane]]:
    """Return the splices by their number, which all lanes share, and the lanes without them."""
    splices = {i: edit for i, edit in enumerate(lanes[0]) if edit.splice is not None}
    for number, lane in enumerate(lanes):
        if any(not np.array_equal(lane[i].tokens, one.tokens) for i, one in splices.items()):
            raise ValueError(
                f"edit {number} of the sweep splices other tokens than the first edit: give where= "
                "to the edits of latents instead"
            )
    rest = [tuple(e for i, e in enumerate(lane) if i not in splices) for lane in lanes]
    return splices, rest


def _join_splices(splices: Splices, lane: Lane) -> Lane:
    """Invert `separate_splices` for one lane."""
    edits = iter(lane)
    count = len(splices) + len(lane)
    return tuple(splices[i] if i in splices else next(edits) for i in range(count))


def _stack_lanes(shapes: Any, lanes: Sequence[Lane]) -> Lane:
    """Return the edits of lanes as one, each array with a leading R axis."""
    return jax.tree.map(
        lambda shape, *leaves: np.stack([np.broadcast_to(leaf, shape) for leaf in leaves]),
        shapes, *lanes, is_leaf=_is_shape,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("logits", "prefix"))
def compiled_lanes(
    metric: Callable[[Out], Any],
    model: Model,
    batch: Batch,
    splices: Splices,
    lanes: Lane,
    captures: dict[str, BoundCapture],
    resume: dict[str, Resume],
    past: Cache | None,
    *,
    logits: Logits,
    prefix: int,
):
    """Run lanes of edits and apply the metric to each; see `sweep`."""

    def lane(edits, metric, model, batch, splices, captures, resume, past):
        taps = Taps(_join_splices(splices, edits), captures, resume=resume, at=prefix)
        if past is None:
            scores, _ = forward(model, batch, taps, logits)
        else:
            positions = batch.positions.from_token(prefix)
            _, deepstack = model.embed(batch, Taps())
            deepstack = None if deepstack is None else deepstack[:, :, prefix:]
            x, _ = model.read(resume["lm"].x, positions, taps, past, deepstack)
            x = jnp.pad(x, ((0, 0), (prefix, 0), (0, 0)))  # positions count from the first token
            scores = logits_at_last(model, batch, x, taps) if logits == "last" else None
        return metric(Out(scores, taps.results(), taps.receipt_list()))

    shared = metric, model, batch, splices, captures, resume, past
    all_lanes = jax.vmap(lane, in_axes=(0, *(None for _ in shared)))
    return mesh.map_lanes(all_lanes, lanes, *shared)


def _common_shapes(lanes: list[Lane]) -> Any:
    """Return the shape of each array to which the arrays of all lanes broadcast."""
    return jax.tree.map(
        lambda *leaves: np.broadcast_shapes(*(np.shape(leaf) for leaf in leaves)), *lanes
    )


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def lane_budget(model: Model) -> int:
    """Return the largest bytes of one layer's widest tensor, over the lanes of one device.

    Returns:
      1 / PART of the device memory that the model leaves free; BUDGET if the device does not report
      its memory, as a CPU.
    """
    free = memory.free_bytes(model)
    return BUDGET if free is None else free // PART


def _widest(shapes: dict[str, SiteShape], splices: Splices) -> int:
    """Return the bytes of the widest tensor of one layer, with logits of only the last token."""
    sizes = {name: math.prod(s.shape) * np.dtype(s.dtype).itemsize for name, s in shapes.items()}
    latents = [
        math.prod(shapes[edit.site.name].shape[:2]) * edit.splice.widest * 4
        for edit in splices.values()
        if edit.splice is not None
    ]
    return max([size for name, size in sizes.items() if name != "logits"] + latents)


def _chunk_size(clean: CleanPass, widest: int, shards: int, budget: int) -> int:
    """Return the number of lanes to run at one time: a power of two within a budget per shard."""
    most = max(1, min(budget // widest, -(-len(clean.first) // shards)))
    candidates = (shards * 2**i for i in range(most.bit_length()))
    return min(candidates, key=lambda n: (clean.cost(n), -n))


class _Rows:
    """The metrics of the lanes, written in any order and stored on disk if there is a path.

    Attributes:
      values: The metrics, [R, ...].
      done: Which lanes are finished, bool[R].
    """

    def __init__(self, edits: Sequence[Edits], store: Store):
        self.values: Any = None
        self.done = np.zeros(len(edits), bool)
        self._store, self._saved = store, store.read()
        if store.path is not None:
            self._edits = np.array([fingerprint(item) for item in edits])
        if self._saved is not None:
            self._check(self._saved["edits"])
            self.done[: len(self._saved["done"])] = self._saved["done"]

    def _check(self, saved: np.ndarray) -> None:
        """Raise an error unless the saved rows are of these edits, or of the first of them."""
        assert self._store.path is not None, "saved rows have a path"
        if not np.array_equal(saved[: len(self._edits)], self._edits[: len(saved)]):
            raise mismatch_error(self._store.path, ["edits"])
        if len(saved) > len(self._edits):
            raise mismatch_error(
                self._store.path, [f"edits ({len(saved)} there, {len(self._edits)} now)"]
            )

    def allocate(self, shape: Any) -> None:
        """Allocate the rows and fill in those that are saved.

        Args:
          shape: The shapes and dtypes of the rows; their number may differ.
        """
        count = len(self.done)
        self.values = jax.tree.map(lambda s: np.zeros((count, *s.shape[1:]), s.dtype), shape)
        if self._saved is not None:
            for i, leaf in enumerate(jax.tree.leaves(self.values)):
                leaf[: len(self._saved["done"])] = self._saved[str(i)]

    def write(self, numbers: Int[np.ndarray, " n"], metrics: Any) -> None:
        """Write the metrics of some lanes, and all that are finished to the disk."""

        def put(rows, values):
            rows[numbers] = np.asarray(values)[: len(numbers)]

        jax.tree.map(put, self.values, metrics)
        self.done[numbers] = True
        if self._store.path is not None:
            arrays = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(self.values))}
            self._store.write({"done": self.done, "edits": self._edits, **arrays})
