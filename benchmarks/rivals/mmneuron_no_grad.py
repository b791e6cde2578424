"""As `mmneuron`, without the graph for gradients that its published code keeps."""

from __future__ import annotations

from benchmarks.rivals import mmneuron
from benchmarks.rivals.serve import Work


def counts(work: Work):
    """Return MMNeuron's counts, computed without gradients."""
    return mmneuron.counts(work, grad=False)
