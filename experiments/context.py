"""The context of a study: the inputs of every step, and the writing of its results."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.running import agreement
from mllm_jax import store
from mllm_jax.batch import Batch
from mllm_jax.data import features
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.report import report

PREVIEW_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The inputs of every step of a study.

    Attributes:
      config: The settings of the study.
      workdir: The folder of its steps and results.
      model: The model under study.
      processor: The processor of the model.
      edits: The edits that are applied in every pass.
      captures: The captures of `--captures`, by name.
    """

    config: ml_collections.ConfigDict
    workdir: store.Workdir
    model: Any
    processor: Any
    edits: Edits = dataclasses.field(default_factory=Edits)
    captures: dict[str, Capture] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a model that reads no pictures.

        Raises:
          ValueError: The model reads only text.
        """
        if self.model.config.vision is None:
            raise ValueError(
                f"config.model={self.config.model}: this model reads only text, but the study "
                "needs pictures; choose a model with a vision tower"
            )

    def claim(self, data: Mapping[str, Any]) -> None:
        """Refuse a workdir with work of another model, data, files, code or versions.

        Call it once, before the first step of the study.

        Args:
          data: The fingerprints of the data of the study (see `content`), by name.
        """
        self.workdir.claim(
            model=self.model, processor=self.processor, files=agreement.files(self.config),
            data=data, **agreement.made_by(),
        )  # fmt: skip

    def preview(
        self,
        results: Mapping[str, Any],
        write_page: Callable[[pathlib.Path, dict[str, Any]], None],
    ) -> None:
        """Write the report of the results so far, at most once a minute.

        The report of a study that was finished before is not changed.

        Args:
          results: The results so far.
          write_page: The function that writes the report, called with the folder and the results.
        """
        page = self.workdir / "index.html"
        is_new = page.exists() and time.time() - page.stat().st_mtime < PREVIEW_SECONDS
        if not is_new and not (self.workdir / "results.json").exists():
            write_page(self.workdir.path, self._with_items(results))

    def _with_items(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Return results with the version of their format, and the study's edits and captures."""
        named = {
            name: {key: self.workdir.config[name][key] for key in ("text", "digest")}
            for name in ("edits", "captures")
            if name in self.workdir.config
        }
        return {"format": report.FORMAT, **results, **named}

    def finish(
        self,
        results: Mapping[str, Any],
        write_page: Callable[[pathlib.Path, dict[str, Any]], None],
        **manifest: Any,
    ) -> None:
        """Write `results.json`, the report and the manifest.

        Args:
          results: The results of the study, as plain JSON values. The version of their format,
            and the edits and captures of the study, are added.
          write_page: The function that writes the report, called with the folder and the results.
          **manifest: Further entries of the manifest, such as `seed`.
        """
        content = self._with_items(results)
        store.atomic_json(self.workdir / "results.json", content)
        write_page(self.workdir.path, content)
        store.write_manifest(self.workdir, **manifest)

    def with_features(self, batch: Batch) -> Batch:
        """Return a batch with its vision features, so that passes skip the vision tower.

        The batch is returned unchanged if an edit is in the vision tower.
        """
        if any(edit.address.site.module == "vision" for edit in self.edits):
            return batch
        return features.read_pictures(self.model, batch)[0]


def content(examples: Iterable[Any]) -> list[str]:
    """Return the fingerprints of examples, which are read one at a time.

    Args:
      examples: The examples, or pairs of an example and its question.
    """
    fingerprints = []
    for item in examples:
        example, *question = item if isinstance(item, tuple) else (item,)
        about = [example.id, example.domain, example.label, example.encoded, example.questions]
        fingerprints.append(store.fingerprint(about, question))
    return fingerprints


def write_captures(path: pathlib.Path, captures: Mapping[str, Any]) -> None:
    """Write captures as one .npz.

    Its arrays are `NAME`, or `NAME/FIELD` for captures with fields, and `NAME/kinds`.
    """
    arrays = {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(captures)
    }
    kinds = {
        f"{name}/kinds": np.array(capture.kinds)
        for name, capture in captures.items()
        if hasattr(capture, "kinds")
    }
    store.atomic_npz(path, arrays | kinds)


def require_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value of a config field that is not one of its choices."""
    if value not in (known := tuple(choices)):
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(known)}")
