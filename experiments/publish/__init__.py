"""Publish a finished study in the documentation; see `experiments/publish/__main__.py`."""
