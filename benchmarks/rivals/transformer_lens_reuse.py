"""As `transformer_lens`, with the vision features computed once and given as embeddings."""

from __future__ import annotations

from benchmarks.rivals import transformer_lens
from benchmarks.rivals.serve import Work


def sweep(work: Work):
    """Return the results of a sweep with TransformerLens that encodes pictures once."""
    return transformer_lens.sweep(work, reuse=True)
