"""What the tests of this folder share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(quick_to_compile):
    """Compile every program of this folder quickly."""
