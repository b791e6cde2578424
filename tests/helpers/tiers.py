"""The tiers of the tests as parameters: which of them the quick suite runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest


def slow_except(quick: Collection[str], names: Iterable[str]) -> list:
    """The names as parameters, marked slow unless they are quick."""
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in names]
