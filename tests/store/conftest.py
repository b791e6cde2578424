"""These programs run once: compiling them is what takes the time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(quick_to_compile):
    """Compile every program of this folder quickly."""
