"""Tensors in files, which are read when they are needed."""

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
    """A tensor in a file that is not read yet.

    Attributes:
      path: The file.
      key: The name of the tensor in the file.
      dtype: Its dtype.
      shape: Its shape.
      offset: The position of its first element in the file, in bytes.
      strides: The steps between neighbours along each axis, in bytes; none is negative.
    """

    path: pathlib.Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The position after its last element in the file, in bytes."""
        if 0 in self.shape:
            return self.offset
        steps = ((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + sum(steps) + self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Return the tensor as a read-only array that is mapped from the file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        stretch = np.memmap(self.path, np.uint8, "r", self.offset, (self.end - self.offset,))
        return np.ndarray(self.shape, self.dtype, stretch, 0, self.strides)


def row_major(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Return the strides in bytes of a row-major tensor without gaps."""
    strides, step = [], dtype.itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
