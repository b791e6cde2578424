"""Models to save and to load."""

from tests.helpers.hf_checkpoint import hf_directory, hf_model, random_model

__all__ = ["hf_directory", "hf_model", "random_model"]
