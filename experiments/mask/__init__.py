"""Trained masks of units: training, tests against random masks, and the report."""
