"""As `nnsight`, with the vision features computed once and given as embeddings."""

from __future__ import annotations

from benchmarks.rivals import nnsight
from benchmarks.rivals.serve import Work


def sweep(work: Work):
    """Return the results of a sweep with nnsight that encodes pictures once."""
    return nnsight.sweep(work, reuse=True)
