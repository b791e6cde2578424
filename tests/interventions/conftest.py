"""The model and the batches of these tests, see `shared_fixtures`."""

from tests.helpers.shared_fixtures import batch, mixed, model, pictures  # noqa: F401
