"""A domain out of a folder of folders: `birds/<label>/<image>`."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence

from mllm_jax import files
from mllm_jax.data.domains.examples import Row
from mllm_jax.data.embedded import questions as questions_lib
from mllm_jax.processors import pictures

# Besides what begins with a dot: leftovers of systems and programs, in lower case.
SYSTEM = {
    "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information",
    "lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip


def read(root: pathlib.Path, name: str, question: str | None) -> list[Row]:
    """The images of a folder, ordered by path; one line says which files are not used.

    Args:
      root: the folder. name: of the domain.
      question: asked instead of the built-in wordings of the category question.
    """
    if not root.is_dir():
        missing = "is no folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"domain folder {files.name(root)} {missing}")
    try:
        images, unused = _divided(root)
    except OSError as error:
        raise OSError(
            f"domain folder {files.name(root)} cannot be read: {files.reason(error)}"
        ) from error
    said = f"{sum(unused.values())} files not used: " + ", ".join(
        f"{what} {count}" for what, count in sorted(unused.items())
    )
    if not images:
        raise ValueError(
            files.line(
                f"domain {files.name(name, 40)!r} is empty: {files.name(root)} holds no images in "
                f"folders named by their label (<label>/<image>){'; ' + said if unused else ''}"
            )
        )
    if unused:
        logging.getLogger(__name__).warning(files.line(f"{files.name(root)}: {said}"))
    labels = sorted({image.parent.name for image in images})
    rows = []
    for image in images:
        label = image.parent.name
        key = f"{label}/{image.name}"
        made = functools.partial(_questions, f"{name} {key}", label, labels, question)
        rows.append(Row(key, label, str(image), made))
    return rows


def _questions(
    key: str, label: str, labels: Sequence[str], question: str | None
) -> tuple[questions_lib.Question, ...]:
    made = questions_lib.questions_for(key, label, labels)
    if question is None:
        return made
    return tuple(
        dataclasses.replace(q, prompt=question) if q.style == "category" else q for q in made
    )


def _divided(root: pathlib.Path) -> tuple[list[pathlib.Path], collections.Counter]:
    """The images that are used, and how many files are not, by what they are."""
    images, unused = [], collections.Counter()
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
    """What a file of a label is, if it is not used; of a folder, what is in it."""
    if _is_system(file.name):
        return ["hidden or system"]
    if not files.is_text(f"{file.parent.name}/{file.name}"):
        return ["named in other than UTF-8"]
    if file.is_dir():
        return ["in deeper folders"] * sum(1 for _ in _deeper(file))
    if file.suffix.lower() not in pictures.EXTENSIONS:
        return [files.name(file.suffix.lower(), 20) or "without an ending"]
    return [] if file.is_file() else ["not regular"]


def _deeper(folder: pathlib.Path) -> Iterator[str]:
    """The files below a folder, whatever they are."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_system(name)]
        yield from names


def _is_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM
