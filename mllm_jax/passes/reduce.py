"""Reduction of captures over a data set: streaming, exact, resumable."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import tqdm

from mllm_jax.arguments import require_whole
from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.forms import FORMS
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.results import Distribution, Entropy, Stats
from mllm_jax.interventions.top_tokens import Histogram, Top
from mllm_jax.passes import arguments
from mllm_jax.passes.run import run
from mllm_jax.sharding import hosts
from mllm_jax.store import Store

# The results that are stored, by the name of their class.
RESULTS: dict[str, type] = {
    kind.__name__: kind for kind in (Stats, Entropy, Distribution, Top, Histogram)
}


def reduce(
    captures: dict[str, Capture],
    model: Model,
    batches: Iterable[Batch],
    edits: Edits | None = None,
    *,
    save: str | pathlib.Path | None = None,
    restart: bool = False,
    every: int = 8,
    label: str = "reduce",
) -> dict[str, Any]:
    """Merge captures over batches, with integers summed exactly in int64.

    Args:
      captures: Captures that can be merged: `stats`, `top`, `sample`, `histogram`, `distribution`,
        and `lens` with `by`.
      model: See `run`.
      batches: A sequence or an iterable, read one by one.
      edits: The edits to apply.
      save: An .npz file for the sums, with fingerprints of the model, the captures, the edits and
        the batches so far. A killed run continues from it and returns the same numbers. Batches
        that were already merged are made again to compare their content, but are not run; further
        batches are added.
      restart: Whether to remove saved results.
      every: The number of batches between two writes.
      label: The label of the progress bar.

    Returns:
      The merged results by name: `results.Stats`, `results.Entropy`, `results.Distribution`,
      `top_tokens.Top` or `top_tokens.Histogram`.

    Raises:
      ValueError: A capture cannot be merged, there is no batch, or `save` is damaged or holds sums
        of another model, other captures, edits or batches, or of more batches.
    """
    arguments.check_stream(captures, model, batches, edits)
    every = require_whole("every", every)
    for name, capture in captures.items():
        if not FORMS[capture.form].merges:
            raise ValueError(
                f"capture '{name}' ({capture.form}) cannot be merged over batches; "
                "use stats, top, sample, histogram, distribution, or lens(..., by=tokens.kind)"
            )
    store = Store(save, restart=restart, model=model, captures=captures, edits=edits)
    saved = store.read()
    total = None if saved is None else _unflatten(saved)
    rest = store.resume(batches)
    count = len(batches) if isinstance(batches, Sized) else None
    written = store.done
    for batch in tqdm.tqdm(rest, desc=label, initial=store.done, total=count, leave=False):
        out = run(model, batch, edits, captures, logits="none")
        part = {name: value.wide() for name, value in out.captures.items()}
        total = part if total is None else {n: total[n].merge(part[n]) for n in part}
        store.add(batch)
        preempted = hosts.preemption_requested()
        if preempted or store.done % every == 0:
            store.write(_flatten(total))
            written = store.done
        if preempted:
            hosts.exit_preempted(label)
    if total is None:
        raise ValueError(f"{label}: there was no batch to reduce")
    if written < store.done:
        store.write(_flatten(total))
    return total


def _flatten(total: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return results as arrays of an .npz file, by name and field."""
    arrays = {}
    for name, value in total.items():
        static = _static_fields(type(value))
        settings = {field: getattr(value, field) for field in static}
        arrays[f"{name}/type"] = np.array([type(value).__name__, json.dumps(settings)])
        for field, array in vars(value).items():
            if field not in static:
                arrays[f"{name}/{field}"] = np.asarray(array)
    return arrays


def _unflatten(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Invert `_flatten`."""
    total: dict[str, Any] = {}
    for name in sorted({key.rpartition("/")[0] for key in arrays if "/" in key}):
        kind, settings = (str(text) for text in arrays[f"{name}/type"])
        static = {
            field: tuple(value) if isinstance(value, list) else value
            for field, value in json.loads(settings).items()
        }
        fields = {
            key.rpartition("/")[2]: arrays[key]
            for key in arrays
            if key.rpartition("/")[0] == name and not key.endswith("/type")
        }
        total[name] = RESULTS[kind](**fields, **static)
    return total


def _static_fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.metadata.get("static")]
