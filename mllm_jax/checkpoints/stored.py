"""A tensor in a file: known by where it lies, read when it is needed."""

from __future__ import annotations

import pathlib
from typing import NamedTuple, Protocol

import numpy as np


class LazyTensor(Protocol):
    """A tensor of a checkpoint that is read when it is needed."""

    @property
    def path(self) -> pathlib.Path:
        """The file that holds the tensor."""

    @property
    def key(self) -> str:
        """The name of the tensor in the file."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""

    def read(self) -> np.ndarray:
        """Return the tensor as an array."""


class Stored(NamedTuple):
    """A tensor in a file, not yet read.

    Attributes:
        path: the file. key: its name there.
        dtype, shape: of the tensor.
        offset: where its first element begins, in bytes.
        strides: from one element to the next along each axis, in bytes; none of them negative.
    """

    path: pathlib.Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """Where its last element ends, in bytes."""
        if 0 in self.shape:
            return self.offset
        steps = ((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + sum(steps) + self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, read-only: a map of its stretch of the file, gone with the array."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        stretch = np.memmap(self.path, np.uint8, "r", self.offset, (self.end - self.offset,))
        return np.ndarray(self.shape, self.dtype, stretch, 0, self.strides)


def row_major(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The strides, in bytes, of a tensor without gaps."""
    strides, step = [], dtype.itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
