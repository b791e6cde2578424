"""Answers of several runs to questions with a known class."""

import numpy as np

CLASSES = 4


def answers(truth, right, *, runs=3, seed=0):
    """Right with a probability, else any class, or none."""
    rng = np.random.default_rng(seed)
    guess = rng.integers(-1, CLASSES, (runs, len(truth)))
    return np.where(rng.random((runs, len(truth))) < right, truth, guess)
