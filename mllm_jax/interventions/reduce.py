"""Reduction of captures over a data set: streaming, exact, resumable."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tqdm

from mllm_jax.interventions import run as run_
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.sharding import hosts
from mllm_jax.store import atomic_npz, fingerprint, structure


def reduce(
    captures: dict[str, Capture],
    model,
    batches: Iterable[Any],
    edits: Edits | None = None,
    *,
    save: str | pathlib.Path | None = None,
    every: int = 8,
    label: str = "reduce",
) -> dict[str, Any]:
    """Captures added up over batches; integers in int64, exactly.

    Args:
      captures: those that can be merged: `stats`, and `lens` with `by`.
      batches: a sequence (only what is missing is made) or an iterable.
      save: an .npz file that the sums are written to; a killed run continues from it and ends
        with the same numbers.
      every: batches between two writes.
      label: of the progress bar.
    """
    for name, capture in captures.items():
        if capture.form not in ("stats", "entropy"):
            raise ValueError(
                f"capture '{name}' ({capture.form}) cannot be added up over batches; "
                "use stats(...), or lens(..., by=tokens.kind)"
            )
    store = _Store(save, model, captures, edits)
    done, total = store.load()
    count = len(batches) if hasattr(batches, "__len__") else None
    rest = (
        (batches[i] for i in range(done, count))
        if hasattr(batches, "__getitem__")
        else itertools.islice(batches, done, None)
    )
    for batch in tqdm.tqdm(rest, desc=label, initial=done, total=count, leave=False):
        out = run_.run(model, batch, edits, captures, logits="none")
        found = {name: value.wide() for name, value in out.captures.items()}
        total = found if total is None else {n: total[n].merge(found[n]) for n in found}
        done += 1
        leaving = hosts.leaving()
        if leaving or done % every == 0:
            store.write(done, total)
        if leaving:
            hosts.leave(label)
    if total is None:
        raise ValueError(f"{label}: there was no batch to reduce")
    store.write(done, total)
    return total


class _Store:
    """Sums on disk, with the structure they belong to."""

    def __init__(self, path, model, captures, edits):
        self.path = pathlib.Path(path) if path else None
        asked = model, captures, edits
        self.asked = "" if path is None else f"{fingerprint(asked)} {structure(*asked)}"

    def load(self) -> tuple[int, dict[str, Any] | None]:
        if self.path is None or not hosts.agree(self.path.exists()):
            return 0, None
        with np.load(self.path, allow_pickle=False) as file:
            if str(file["asked"]) != self.asked:
                raise ValueError(
                    f"{self.path} holds sums of another model, captures or edits: remove it, "
                    "or save elsewhere"
                )
            arrays = {name: file[name] for name in file.files}
        return int(arrays["done"]), _unflatten(arrays)

    def write(self, done: int, total: dict[str, Any]) -> None:
        if self.path is not None:
            arrays = {"done": np.int64(done), "asked": np.array(self.asked)}
            atomic_npz(self.path, arrays | _flatten(total))


def _flatten(total: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in total.items():
        arrays[f"{name}/type"] = np.array([type(value).__name__, *value.kinds])
        for field, array in vars(value).items():
            if field != "kinds":
                arrays[f"{name}/{field}"] = array
    return arrays


def _unflatten(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    from mllm_jax.interventions import captures

    names = sorted({key.split("/")[0] for key in arrays if "/" in key})
    total = {}
    for name in names:
        kind, *kinds = (str(s) for s in arrays[f"{name}/type"])
        fields = {
            key.split("/")[1]: arrays[key]
            for key in arrays
            if key.startswith(f"{name}/") and not key.endswith("/type")
        }
        total[name] = getattr(captures, kind)(**fields, kinds=tuple(kinds))
    return total
