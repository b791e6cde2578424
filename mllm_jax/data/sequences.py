"""Sequences whose items are made when they are read."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence that makes an item when it is read; a slice of it is a list of items."""

    @abc.abstractmethod
    def item(self, index: int) -> Item:
        """Return the item at an index, which is at least 0 and below the length."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(len(self))[index]]
        return self.item(range(len(self))[index])
