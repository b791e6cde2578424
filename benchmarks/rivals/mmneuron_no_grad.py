"""As `mmneuron`, without the graph for gradients that its published code keeps."""

from __future__ import annotations

from benchmarks.rivals import mmneuron
from benchmarks.rivals.serve import Work


def counts(work: Work):
    return mmneuron.counts(work, grad=False)
