"""The five VQA data sets of MMNeuron: TFDS builders, questions and prompts.

    vqa.build("vqav2", manual="/data/vqa")           # from /data/vqa/vqav2, once; no TensorFlow
    domain = vqa.load("vqav2", "val", model="llava_next")   # a Domain with the paper's prompts
    print(vqa.instructions("vqav2"))                 # what to download, and where it goes

A data set has the splits "train" (where neurons are counted) and "val" (where answers are scored),
in the order of the released code, with one question per picture except in lingoqa. The size "paper"
has the first 10,001 and 1,001 examples, "full" has all. `tfds.builder_from_directory` also reads
the built data sets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
from etils import epath

from mllm_jax import store
from mllm_jax.data import domains
from mllm_jax.data.sequences import LazySequence
from mllm_jax.data.vqa import prompts
from mllm_jax.data.vqa.questions import VqaQuestion
from mllm_jax.processors import pictures as picture_files

NAMES = prompts.DATASETS
Size = Literal["paper", "full"]
SPLITS = ("train", "val")
SIZES: tuple[Size, ...] = ("paper", "full")


def instructions(name: str) -> str:
    """Return what to download for a data set, and to which folder."""
    return _builder(name).MANUAL_DOWNLOAD_INSTRUCTIONS


def build(
    name: str,
    manual: str | os.PathLike,
    root: str | os.PathLike | None = None,
    size: Size = "paper",
) -> pathlib.Path:
    """Build a data set into array_record files, unless it exists.

    Args:
      name: One of NAMES.
      manual: The folder that holds `<name>/` with the files as they were downloaded.
      root: The folder where data sets are kept; the user's cache by default.
      size: One of SIZES.

    Returns:
      The folder of the built data set.

    Raises:
      FileNotFoundError: Files are missing; the message lists them and their sources.
    """
    return _builder(name).build(manual, _root(root), domains.require_known("size", size, SIZES))


def load(
    name: str,
    split: str = "val",
    *,
    model: prompts.Model,
    of: prompts.Pass = "generation",
    root: str | os.PathLike | None = None,
    size: Size = "paper",
) -> domains.Domain:
    """Return a built data set as a domain with the prompts of the paper.

    Args:
      name: One of NAMES.
      split: "train" or "val".
      model: "llava_next", "instructblip", or "chat" for the chat template of any other model.
      of: "activation", "lens" or "generation"; see `prompts.prompt`.
      root: The folder where data sets are kept, which may be a bucket, "gs://..."; the user's
        cache by default.
      size: One of SIZES.

    Returns:
      The domain; each example has one VqaQuestion. Pictures are read when they are needed.

    Raises:
      FileNotFoundError: It is not built; the message states how to build it.
    """
    root = _root(root)
    domains.require_known("split", split, SPLITS)
    source = _builder(name).source(root, split, domains.require_known("size", size, SIZES))
    if source is None:
        raise FileNotFoundError(
            f"{name} ({size}) is not built in {root}: run "
            f"mllm_jax.data.vqa.build({name!r}, manual=FOLDER). {instructions(name)}"
        )
    return domains.Domain(name, split, _Records(name, source, model, of))


def side_by_side(pictures: Sequence[bytes]) -> bytes:
    """Join pictures from left to right into one, encoded without loss.

    Raises:
      ValueError: Their heights differ.
    """
    opened = [np.asarray(picture_files.read(data)) for data in pictures]
    heights = sorted({len(pixels) for pixels in opened})
    if len(heights) != 1:
        raise ValueError(f"frames side by side must be of one height, not {heights}")
    out = io.BytesIO()
    PIL.Image.fromarray(np.concatenate(opened, axis=1)).save(out, "BMP")
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class _Records(LazySequence[domains.Example]):
    """Examples of a TFDS data source."""

    name: str
    source: Any  # a data source of TFDS
    model: prompts.Model
    of: prompts.Pass

    @property
    def fingerprint(self) -> str:
        """The name and version of the data set, with the sha256 of TFDS's description of its files.

        The files themselves are too many to be read for it.
        """
        info = self.source.dataset_info
        return f"{info.full_name} sha256:{hashlib.sha256(info.as_json.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int) -> domains.Example:
        """Return the item at an index; see `LazySequence`."""
        record = self.source[index]
        pictures = record["pictures"]
        text = {key: record[key].decode() for key in ("id", "question", "answer", "type", "source")}
        many = {key: tuple(value.decode() for value in record[key])
                for key in ("answers", "confidence", "choices")}  # fmt: skip
        question = VqaQuestion(
            style="choice" if many["choices"] else "open",
            prompt=prompts.prompt(
                self.name, text["question"], many["choices"], model=self.model, of=self.of
            ),
            answer=text["answer"],
            options=tuple("ABCD") if many["choices"] else tuple(dict.fromkeys(many["answers"])),
            id=text["id"],
            text=text["question"],
            type=text["type"],
            **many,
        )
        return domains.Example(
            id=f"{index} {text['id']}",
            domain=self.name,
            label=text["answer"],
            encoded=pictures[0] if len(pictures) == 1 else side_by_side(pictures),
            questions=(question,),
            source=text["source"],
        )


def _builder(name: str):
    domains.require_known("data set", name, NAMES)
    return importlib.import_module(f"mllm_jax.data.vqa.{name}").Builder


def _root(root: str | os.PathLike | None) -> epath.Path:
    return epath.Path(store.cache_directory() / "vqa" if root is None else root)
