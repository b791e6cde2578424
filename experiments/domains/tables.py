"""Build the embedded domains, and tabulate their pictures, sources and licences."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax import store
from mllm_jax.data import domains, packages, tasks
from mllm_jax.report import tables

Index = Mapping[str, Any]  # the result of `domains.build` for a domain


def run(names: Sequence[str] | None, root: str | None, licences: str | None) -> None:
    """Build domains, print their tables, and write those of the licences.

    Args:
      names: The domains to build; None for all.
      root: The folder of the domains; None for the user's cache.
      licences: The path of the Markdown file to write; None for none.

    Raises:
      ValueError: No domain could be built.
    """
    folder = pathlib.Path(root) if root else domains.default_root()
    indices = []
    for name in names or domains.EMBEDDED:
        try:
            indices.append(domains.build(name, folder))
        except packages.MissingPackage as error:
            print(f"domain {name!r} is left out: {error}", file=sys.stderr)
    if not indices:
        raise ValueError("no domain could be built")
    text = page(indices)
    print(f"{text}\n\nThe domains are in {folder}")
    if {*tasks.EMBEDDED} <= {index["domain"] for index in indices}:
        print(f"\n# Classification tasks\n\n{classes(tasks.embedded(root=folder))}")
    if licences:
        store.write(licences, text + "\n")


def counts(indices: Sequence[Index]) -> str:
    """Return a table of the pictures of each domain."""
    rows = []
    for index in indices:
        test, train = (index["splits"][split] for split in ("test", "train"))
        size = (test["bytes"] + train["bytes"]) / 2**20
        labels = len(test["labels"])
        rows.append(
            (index["domain"], test["examples"], train["examples"], labels, f"{size:.1f} MB")
            + (index["note"],)
        )
    return tables.markdown(("domain", "test", "train", "labels", "size", "labels and split"), rows)


def sources(indices: Sequence[Index]) -> str:
    """Return a table of the packages that the pictures come from."""
    return tables.markdown(
        ("domain", "package", "licence", "home"),
        (
            (
                index["domain"],
                f"{source['origin']} {source['name']} {source['version']}",
                source["licence"],
                source["homepage"],
            )
            for index in indices
            for source in index["sources"]
        ),
    )


def images_by_licence(indices: Sequence[Index]) -> str:
    """Return a table of the pictures by licence."""
    rows = []
    for index in indices:
        test, train = (index["splits"][split]["licences"] for split in ("test", "train"))
        for licence in sorted({*test, *train}):
            rows.append((index["domain"], licence, test.get(licence, 0), train.get(licence, 0)))
    return tables.markdown(("domain", "licence of the image", "test", "train"), rows)


def classes(by_name: Mapping[str, tasks.Task]) -> str:
    """Return a table of the classes of each task."""
    rows = []
    for name, task in by_name.items():
        for number, label in enumerate(task.classes):
            counts = (int(task.counts(split)[number]) for split in tasks.SPLITS)
            rows.append((name, label, *counts))
    return tables.markdown(("task", "class", *tasks.SPLITS), rows)


def page(indices: Sequence[Index]) -> str:
    """Return the page on sources and licences as Markdown."""
    return "\n\n".join(
        [
            "# Images of the embedded domains",
            "Written by `python -m experiments.domains --licences=mllm_jax/data/LICENCES.md`.\n"
            "The images are not part of this repository: they are built on the user's machine\n"
            "from the packages below, and keep the licences of those packages.",
            "## Counts",
            counts(indices),
            "## Packages",
            sources(indices),
            "## Licences of the images",
            images_by_licence(indices),
        ]
    )
