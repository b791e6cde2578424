"""These programs run once: compiling them is what takes the time."""

from __future__ import annotations

import pytest

from tests.helpers.hf_checkpoint import hf_directory, hf_model

__all__ = ["hf_directory", "hf_model"]


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(quick_to_compile):
    """Compile every program of this folder quickly."""
