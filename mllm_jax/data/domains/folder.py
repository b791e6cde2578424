"""The examples of a folder of folders: `birds/<label>/<image>`."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence

from mllm_jax import files
from mllm_jax.data.domains import table
from mllm_jax.data.domains.examples import Row
from mllm_jax.data.embedded import questions as questions_lib
from mllm_jax.processors import pictures

# Files and folders that systems and programs leave behind, in lower case.
SYSTEM = {
    "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information",
    "lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip


def read(root: pathlib.Path, name: str, question: str | None) -> list[Row]:
    """Return the images of a folder, ordered by path; a warning counts the files not used.

    Args:
      root: The folder.
      name: The domain's name.
      question: The question that replaces the built-in wordings of the category question.

    Raises:
      OSError: There is no such folder, or it cannot be read.
      ValueError: It holds no images in folders named by their label.
    """
    if not root.is_dir():
        missing = "is not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"domain folder {files.name(root)} {missing}")
    try:
        images, unused = _find_images(root)
    except OSError as error:
        raise OSError(
            f"domain folder {files.name(root)} cannot be read: {files.reason(error)}"
        ) from error
    summary = f"{sum(unused.values())} files not used: " + ", ".join(
        f"{what} {count}" for what, count in sorted(unused.items())
    )
    if not images:
        raise ValueError(
            files.line(
                f"domain {files.name(name, 40)!r} is empty: {files.name(root)} holds no images in "
                f"folders named by their label (<label>/<image>){'; ' + summary if unused else ''}"
            )
        )
    if unused:
        logging.getLogger(__name__).warning(files.line(f"{files.name(root)}: {summary}"))
    labels = sorted({image.parent.name for image in images})
    table.warn_of_twins(f"{files.name(root)}: the labels", labels)
    rows = []
    for image in images:
        label = image.parent.name
        key = f"{label}/{image.name}"
        questions = functools.partial(_questions, f"{name} {key}", label, labels, question)
        rows.append(Row(key, label, str(image), questions))
    return rows


def _questions(
    key: str, label: str, labels: Sequence[str], question: str | None
) -> tuple[questions_lib.Question, ...]:
    questions = questions_lib.questions_for(key, label, labels)
    if question is None:
        return questions
    return tuple(
        dataclasses.replace(q, prompt=question) if q.style == "category" else q for q in questions
    )


def _find_images(root: pathlib.Path) -> tuple[list[pathlib.Path], collections.Counter[str]]:
    """Return the images, and the numbers of other files by their kind."""
    images: list[pathlib.Path] = []
    unused: collections.Counter[str] = collections.Counter()
    for entry in sorted(root.iterdir()):
        if _is_system(entry.name):
            unused["hidden or system"] += 1
        elif not entry.is_dir():
            unused["beside the folders"] += 1
        else:
            for file in sorted(entry.iterdir()):
                if what := _unused(file):
                    unused.update(what)
                else:
                    images.append(file)
    return images, unused


def _unused(file: pathlib.Path) -> list[str]:
    """Return the kind of a file that is not used, once for each file that it stands for."""
    if _is_system(file.name):
        return ["hidden or system"]
    if not files.is_text(f"{file.parent.name}/{file.name}"):
        return ["with names that are not UTF-8"]
    if file.is_dir():
        return ["in deeper folders"] * sum(1 for _ in _deeper(file))
    if file.suffix.lower() not in pictures.EXTENSIONS:
        return [files.name(file.suffix.lower(), 20) or "without an extension"]
    return [] if file.is_file() else ["not regular"]


def _deeper(folder: pathlib.Path) -> Iterator[str]:
    """Yield the names of all files below a folder."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_system(name)]
        yield from names


def _is_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM
