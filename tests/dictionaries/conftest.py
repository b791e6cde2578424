"""The model and the batch of the tests of interventions."""

from tests.helpers.shared_fixtures import batch, model, pictures

__all__ = ["batch", "model", "pictures"]
