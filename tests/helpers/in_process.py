"""Studies that run in this process, on a tiny model, and are killed between their steps."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import PIL.Image
import pytest

import mllm_jax as mj
from mllm_jax.store import Workdir

QUESTION = "what is shown in the picture ?"  # words of the tiny tokenizer


class Killed(BaseException):
    """What ends a study, and no study catches."""


def write_questions(
    folder: pathlib.Path, images: Iterable[PIL.Image.Image], labels: Sequence[str]
) -> str:
    """Write pictures with a question for each, whose answers take turns; the path of the table."""
    rows = []
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
        asked = {"question": QUESTION, "options": labels, "style": "category"}
        rows.append(json.dumps({"image": f"{i}.png", "answer": labels[i % len(labels)]} | asked))
    (folder / "noise.jsonl").write_text("\n".join(rows))
    return str(folder / "noise.jsonl")


def run(study: Any, config: Any, folder: pathlib.Path, loaded: tuple[Any, Any], *more) -> Workdir:
    """Run a study of a model that is loaded already; its workdir."""
    workdir = Workdir(folder, config.to_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj, "load", lambda name: loaded)
        study.run(config, workdir, *more)
    return workdir


def dies_after(function: Callable, calls: int) -> Callable:
    """The function, which raises Killed after so many calls."""
    left = iter(range(calls))

    def call(*args, **options):
        if next(left, None) is None:
            raise Killed
        return function(*args, **options)

    return call


@contextlib.contextmanager
def killed_after(calls: int, place: Any = Workdir, name: str = "_step") -> Iterator[None]:
    """Expect that what runs in here is killed after some calls, by default steps of a workdir."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, dies_after(getattr(place, name), calls))
        yield


def assert_same_files(
    whole: Workdir, again: Workdir, *, apart_from: Callable[[pathlib.Path], bool] = lambda _: False
) -> None:
    """The files of one workdir are in the other, with the same bytes, apart from the manifest."""
    differing = {}
    for path in sorted(path for path in whole.path.rglob("*") if path.is_file()):
        name = path.relative_to(whole.path)
        if name.name == "manifest.json" or apart_from(name):
            continue
        own, other = path.read_bytes(), (again.path / name).read_bytes()
        if own != other:
            pairs = enumerate(zip(own, other, strict=False))
            at = next((n for n, (a, b) in pairs if a != b), min(len(own), len(other)))
            differing[str(name)] = own[max(0, at - 40) : at + 20], other[max(0, at - 40) : at + 20]
    assert not differing
