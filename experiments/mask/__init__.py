"""Trained masks of units: training, test against random masks, and its report."""
