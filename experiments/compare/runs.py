"""Finished runs of a study: their settings, numbers, examples and neurons."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.compare import numbers
from mllm_jax import files, store
from mllm_jax.report import report

RECORDS = ("results.json", "manifest.json")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: Its name in tables.
      folder: Its workdir.
      results: Its results.json.
      manifest: Its manifest.json.
    """

    name: str
    folder: pathlib.Path
    results: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @functools.cached_property
    def numbers(self) -> dict[str, numbers.Number]:
        """The numbers of its results by name."""
        return numbers.numbers(self.results)

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """The settings by name: config, versions, fingerprints of model and data."""
        return {name: value for name, value in _flat(self.manifest, ()) if name != "files"}

    def examples(self, name: str) -> np.ndarray | None:
        """Return the values by example whose mean a number is; None if they are not stored."""
        steps = _STEPS.get(self.results["study"])
        values = None if steps is None else steps(self, name.split(" / "))
        if values is None or not np.isclose(values.mean(), self.numbers[name].value, atol=1e-9):
            return None
        return values

    def masks(self) -> dict[str, np.ndarray]:
        """Return the neurons that it selected, bool[L, F] by site and domain."""
        path = self.folder / "masks.npz"
        if not path.exists():
            return {}
        arrays = store.read_npz(path)
        domains = [str(name) for name in arrays.pop("domains")]
        return {
            f"{site} / {domain}": mask[number]
            for site, mask in arrays.items()
            for number, domain in enumerate(domains)
        }

    def step(self, path: str, field: str) -> np.ndarray | None:
        """Return an array of a step of the study as float64, or None if there is none."""
        file = self.folder / "steps" / f"{path}.npz"
        if not file.exists():
            return None
        values = store.read_npz(file).get(field)
        return None if values is None else np.asarray(values, np.float64)


def read(folders: Sequence[str]) -> list[Run]:
    """Read finished runs of one study.

    Raises:
      ValueError: A run is not finished, or they are of different studies or formats.
    """
    found = [_read(pathlib.Path(folder)) for folder in folders]
    first = found[0]
    for run in found[1:]:
        if run.results["study"] != first.results["study"]:
            raise ValueError(
                f"{run.folder} is a run of {run.results['study']}, but {first.folder} is one of "
                f"{first.results['study']}: compare runs of one study"
            )
    names = _names([run.folder for run in found])
    return [dataclasses.replace(run, name=name) for run, name in zip(found, names, strict=True)]


def _read(folder: pathlib.Path) -> Run:
    contents: list[dict[str, Any]] = []
    for record in RECORDS:
        path = folder / record
        if not path.is_file():  # the manifest is written last
            raise ValueError(
                f"{folder} is not a finished study: it has no {record}; run the study to its end"
            )
        try:
            content = json.loads(files.read_bytes(path, 2**30))
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): run the study again") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: not a JSON object; run the study again")
        contents.append(content)
    results, manifest = contents
    if "study" not in results:
        raise ValueError(f"{folder} is not a finished study: its results.json names no study")
    if results.get("format") != report.FORMAT:
        raise ValueError(
            f"{folder}: its results.json has format {results.get('format')}, this version reads "
            f"{report.FORMAT}; run the study again"
        )
    return Run(folder.name, folder, results, manifest)


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """Return the shortest ends of paths that distinguish the folders."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _flat(value: Any, name: tuple[str, ...]) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, (*name, str(key)))]
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return [(".".join(name), text)]


def _evaluated(run: Run, name: Sequence[str]) -> np.ndarray | None:
    if len(name) != 4 or (name[0], name[-1]) != ("accuracy", "accuracy"):
        return None
    return run.step(f"{name[1]}-{name[2]}", "right")


def _ablated(run: Run, name: Sequence[str]) -> np.ndarray | None:
    """Return scores of domain neurons: those of the model, or their change by an ablation."""
    if name[0] == "baseline" and name[-1] == "accuracy":
        return run.step(f"scores/{name[1]}/clean", "score")
    if name[0] != "ablation" or name[-1] != "difference":
        return None
    for row, label in zip(
        run.results["ablation"], numbers.item_names(run.results["ablation"]), strict=True
    ):
        if label == name[1]:
            draw = "selected" if row["control"] is None else f"{row['control']}{row['draw']}"
            clean = run.step(f"scores/{row['data']}/clean", "score")
            scores = run.step(f"scores/{row['data']}/{row['module']}-{row['mask']}-{draw}", "score")
            return None if clean is None or scores is None else scores - clean
    return None


# How studies keep the values of numbers by example.
_STEPS = {"evaluate": _evaluated, "domain_neurons": _ablated}
