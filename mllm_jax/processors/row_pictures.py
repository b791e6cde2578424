"""The pictures of each row, from the images argument or from chats."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import PIL.Image

from mllm_jax.processors import pictures
from mllm_jax.processors.prompts import Chat, image_parts


def open_rows(images: Any) -> list[list[PIL.Image.Image]]:
    """Return the pictures of each row in RGB; a picture that is given twice is opened once.

    Args:
      images: For each row a picture, or a list of pictures; see `pictures.read`.
    """
    opened: dict[int | str, PIL.Image.Image] = {}
    rows = as_rows(images)
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            if (key := _key(picture)) not in opened:
                opened[key] = pictures.read(picture, f"picture {place} of row {number}")
    return [[opened[_key(picture)] for picture in row] for row in rows]


def _key(picture: Any) -> int | str:
    """Return the key that identifies a picture: the path, or the object."""
    return str(os.fspath(picture)) if isinstance(picture, (str, os.PathLike)) else id(picture)


def images_or_those_of_chats(images: Any, prompts: Sequence[str | Chat]) -> Any:
    """Return the images argument, or, if it is None, the pictures in the chats.

    Raises:
      ValueError: Both are given.
    """
    of_chats = [
        [part["image"] for part in image_parts(prompt) if "image" in part] for prompt in prompts
    ]
    if not any(of_chats):
        return images
    if images is not None:
        raise ValueError("the chats contain pictures: give those or images, not both")
    return of_chats


def as_rows(images: Any) -> list[list[Any]]:
    """Return pictures as a list for each row.

    Args:
      images: For each row a picture, or a list of pictures.

    Raises:
      ValueError: It is a single picture, or not a list.
    """
    single = isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "convert")
    if single or (hasattr(images, "ndim") and images.ndim < 4) or not isinstance(images, Iterable):
        raise ValueError(
            "images is a list with a picture, or a list of pictures, for each row; got "
            f"{type(images).__name__}: write images=[picture]"
        )
    return [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
