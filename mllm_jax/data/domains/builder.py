"""The embedded domains: built from packages on first use, read back afterwards."""

from __future__ import annotations

import collections
import functools
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from mllm_jax import store
from mllm_jax.data import packages
from mllm_jax.data.domains import records
from mllm_jax.data.domains.domain import Domain
from mllm_jax.data.domains.examples import Example
from mllm_jax.data.domains.records import SPLITS, VERSION, Records
from mllm_jax.data.embedded import questions as questions_lib
from mllm_jax.data.embedded import recipe as recipe_lib
from mllm_jax.store import stamps

EMBEDDED = tuple(questions_lib.KINDS)
ABANDONED_SECONDS = 7200.0  # a partial build of this age is not running anymore


def embedded(
    split: str = "test",
    domains: Sequence[str] | None = None,
    root: str | os.PathLike | None = None,
) -> dict[str, Domain]:
    """Return the embedded domains; the first call builds them, in about two minutes.

    Args:
      split: "test" or "train".
      domains: Names from EMBEDDED; all by default. A named domain that cannot be built raises an
        error; by default such a domain is reported in one line and left out.
      root: The folder where they are kept; the user's cache by default.

    Returns:
      Domains by name, in the order of the names.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the embedded domains have {list(SPLITS)}")
    if unknown := [name for name in domains or () if name not in EMBEDDED]:
        raise ValueError(f"unknown domain {unknown[0]!r}; embedded are {list(EMBEDDED)}")
    root = default_root() if root is None else pathlib.Path(root)
    built = {}
    for name in domains or EMBEDDED:
        try:
            build(name, root)
        except packages.MissingPackage as error:
            if domains is not None:
                raise
            print(f"domain {name!r} is left out: {error}", file=sys.stderr, flush=True)
        else:
            built[name] = Domain(name, split, Records(root / name / f"{split}.array_record"))
    return built


def default_root() -> pathlib.Path:
    """Return the folder of the user's cache where the embedded domains are kept."""
    return store.cache_directory() / "domains" / VERSION


def recipe(name: str) -> recipe_lib.Recipe:
    """Return the recipe of an embedded domain.

    Raises:
      MissingPackage: A Python package that it needs is not installed.
    """
    try:
        return importlib.import_module(f"mllm_jax.data.embedded.{name}").RECIPE
    except ImportError as error:
        wheel = "pyshp" if error.name == "shapefile" else error.name
        raise packages.MissingPackage(
            f"domain {name!r} needs the package {wheel!r}: pip install {wheel}"
        ) from error


def build(name: str, root: pathlib.Path) -> dict[str, Any]:
    """Build one embedded domain under `root/name`, unless it exists.

    All files are written to a hidden folder, read back, and moved into place at once: a killed
    build or a full disk leaves no partial domain behind.

    Returns:
      The index: counts, sources, licences, and the parts that are missing.
    """
    index = root / name / "index.json"
    if index.is_file():
        return _read_index(name, root / name)
    domain_recipe = recipe(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.partial.", dir=root))
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        result = _write(domain_recipe, partial)
        try:
            os.replace(partial, root / name)
        except OSError:  # another process was faster
            if not index.is_file():
                raise
    except OSError as error:
        raise _unwritable(root, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for line in result["missing"]:
        print(f"domain {name!r} is built without a part: {line}", file=sys.stderr, flush=True)
    return result


def _read_index(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Return the index of an existing domain after a check of its files' fingerprints."""
    mend = f"delete {folder} to build it again"
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        splits = {f"{s}.array_record": index["splits"][s]["fingerprint"] for s in SPLITS}
        owner = index["domain"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'index.json'} is damaged; {mend}") from error
    if owner != name:
        raise ValueError(f"{folder} holds the domain {owner!r}; {mend}")
    changed = stamps.check(folder, splits, functools.partial(_fingerprint_of, name))
    if changed is not None:
        raise ValueError(
            f"{folder / changed}: its pictures are not those that were written; {mend}"
        )
    return index


def _fingerprint_of(name: str, path: pathlib.Path) -> str:
    """Return the fingerprint of the examples in a file, "" if one of them cannot be read."""
    examples = Records(path)
    try:
        return Domain(name, path.stem, examples).fingerprint
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError):
        return ""


def _write(domain_recipe: recipe_lib.Recipe, folder: pathlib.Path) -> dict[str, Any]:
    """Write the files of a domain into a folder, and return its index."""
    started = time.monotonic()
    name = domain_recipe.name
    bar = tqdm.tqdm(total=domain_recipe.size, desc=f"{name}: reading packages", unit="image")
    with bar:
        candidates, missing = recipe_lib.find(domain_recipe)
        bar.set_description(name)
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for split, picture in recipe_lib.choose(domain_recipe, candidates):
            splits[split].append(_example(domain_recipe, picture))
            bar.update()
        bar.total = bar.n
    index = {
        "domain": name,
        "kind": questions_lib.KINDS[name],
        "splits": {
            split: _write_split(name, split, examples, folder) for split, examples in splits.items()
        },
        "sources": [
            {
                "origin": source.origin,
                "name": source.name,
                "version": source.found_version,
                "licence": source.licence,
                "homepage": source.homepage,
            }
            for source in domain_recipe.sources
        ],
        "note": domain_recipe.note,
        "missing": missing,
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False))
    return index


def _write_split(
    name: str, split: str, examples: list[Example], folder: pathlib.Path
) -> dict[str, Any]:
    """Write one split, read it back, and return its entry in the index."""
    path = folder / f"{split}.array_record"
    records.write(path, examples)
    fingerprint = Domain(name, split, Records(path)).fingerprint
    if fingerprint != Domain(name, split, examples).fingerprint:
        raise OSError(f"{path.name} reads back differently")
    return {
        "examples": len(examples),
        "bytes": path.stat().st_size,
        "fingerprint": fingerprint,
        "labels": dict(sorted(collections.Counter(e.label for e in examples).items())),
        "licences": dict(sorted(collections.Counter(e.licence for e in examples).items())),
    }


def _example(domain_recipe: recipe_lib.Recipe, picture: recipe_lib.Picture) -> Example:
    """Return the example of a picture, with its questions."""
    candidate = picture.candidate
    return Example(
        id=candidate.name,
        domain=domain_recipe.name,
        label=candidate.label,
        encoded=recipe_lib.jpeg(picture.image),
        questions=questions_lib.questions_for(
            f"{domain_recipe.name} {candidate.name}",
            candidate.label,
            domain_recipe.family(candidate.label).labels,
            questions_lib.KINDS[domain_recipe.name],
        ),
        source=candidate.source,
        licence=candidate.licence,
    )


def _remove_abandoned(root: pathlib.Path) -> None:
    """Remove the remains of killed builds; a build that still runs is younger."""
    for partial in root.glob(".*.partial.*"):
        if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _unwritable(root: pathlib.Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"cannot write the domains to {root} ({error.strerror or error}): make room, or set "
        f"MLLM_JAX_CACHE to another folder",
    )
