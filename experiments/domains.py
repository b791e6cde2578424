"""Builds the embedded visual domains and prints what is in them, where from, and the licences.

    python -m experiments.domains
    python -m experiments.domains --licences=mllm_jax/data/LICENCES.md

Takes about two minutes and 600 MB of downloads the first time; no root is needed. The images stay
in the user's cache (`MLLM_JAX_CACHE`).
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from mllm_jax.data import domains, packages, tasks
from mllm_jax.report import tables

ROOT = flags.DEFINE_string("root", None, "Where the domains are kept; the user's cache by default.")
DOMAINS = flags.DEFINE_list("domains", None, "Domains to build; all by default.")
LICENCES = flags.DEFINE_string("licences", None, "A Markdown file to write the tables to.")


def counts(indices: Sequence[dict]) -> str:
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


def sources(indices: Sequence[dict]) -> str:
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


def images_by_licence(indices: Sequence[dict]) -> str:
    """Return a table of the pictures by licence."""
    rows = []
    for index in indices:
        test, train = (index["splits"][split]["licences"] for split in ("test", "train"))
        for licence in sorted({*test, *train}):
            rows.append((index["domain"], licence, test.get(licence, 0), train.get(licence, 0)))
    return tables.markdown(("domain", "licence of the image", "test", "train"), rows)


def classes(found: dict[str, tasks.Task]) -> str:
    """Return a table of the classes of each task."""
    rows = []
    for name, task in found.items():
        for number, label in enumerate(task.classes):
            counts = (int(task.counts(split)[number]) for split in tasks.SPLITS)
            rows.append((name, label, *counts))
    return tables.markdown(("task", "class", *tasks.SPLITS), rows)


def page(indices: Sequence[dict]) -> str:
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


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    root = pathlib.Path(ROOT.value) if ROOT.value else domains.default_root()
    indices = []
    try:
        for name in DOMAINS.value or domains.EMBEDDED:
            try:
                indices.append(domains.build(name, root))
            except packages.MissingPackage as error:
                print(f"domain {name!r} is left out: {error}", file=sys.stderr)
        if not indices:
            raise ValueError("no domain could be built")
        text = page(indices)
        print(f"{text}\n\nKept in {root}")
        if {*tasks.EMBEDDED} <= {index["domain"] for index in indices}:
            print(f"\n# Classification tasks\n\n{classes(tasks.embedded(root=root))}")
        if LICENCES.value:
            path = pathlib.Path(LICENCES.value)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(text + "\n")
            os.replace(partial, path)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
