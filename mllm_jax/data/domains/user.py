"""A user's domains: folders and tables, divided into a training and a test split."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Sequence

from mllm_jax import files
from mllm_jax.data.domains import folder, table
from mllm_jax.data.domains.domain import Domain, read_table
from mllm_jax.data.domains.examples import FileExamples, Row
from mllm_jax.data.domains.records import SPLITS

TABLES: dict[str, table.Reader] = {
    ".csv": table.from_csv,
    ".tsv": table.from_csv,
    ".jsonl": table.from_jsonl,
    ".json": table.from_json,
}


def load_user_domains(paths: Sequence[str | os.PathLike], split: str = "test") -> dict[str, Domain]:
    """Return a user's domains by name.

    A quarter of the examples, chosen by the hash of their id, is the test split.

    Args:
      paths: Folders, named by their own name, and tables (see TABLES), named by their stem.
      split: "test" or "train".

    Raises:
      ValueError: Two domains share a name, a domain is empty, or a path is neither a folder nor a
        table.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; own domains have {list(SPLITS)}")
    domains: dict[str, Domain] = {}
    for path in map(pathlib.Path, paths):
        name, rows = read_rows(path)
        if name in domains:
            raise ValueError(f"two domains are named {name!r}; rename one of {list(paths)}")
        selected = [row for row in rows if is_test(row.id) == (split == "test")]
        if not selected:
            raise ValueError(
                f"domain {name!r} is empty in its {split} split: {files.name(path)} has only "
                f"{len(rows)} examples, and a quarter of them is for testing"
            )
        domains[name] = Domain(name, split, FileExamples(name, selected))
    return domains


def is_test(example_id: str) -> bool:
    """Return whether the example of this id is in the test split."""
    digest = hashlib.sha256(example_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 4 == 0


def read_rows(path: pathlib.Path) -> tuple[str, Sequence[Row]]:
    """Return the name and the examples of a folder or a table."""
    read = TABLES.get(path.suffix.lower())
    if path.is_dir() or (not path.exists() and read is None):
        name = path.resolve().name
        return name, folder.read(path, name, None)
    if read is None:
        raise ValueError(
            f"domain {files.name(path)} is neither a folder nor a table, whose extension must be "
            f"one of {', '.join(TABLES)}"
        )
    return path.stem, read_table(path, path.stem, read)
