"""The model and the batches of these tests, see `shared_fixtures`."""

import pytest

from tests.helpers.shared_fixtures import batch, mixed, model, pictures  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def _quick_to_compile(quick_to_compile):
    """Compile every program of this folder quickly."""
