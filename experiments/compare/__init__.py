"""Compare finished studies side by side; see `experiments/compare/__main__.py`."""
