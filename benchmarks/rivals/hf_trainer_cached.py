"""LLaVA's trainer, with the features of the frozen vision tower computed once."""

from __future__ import annotations

from benchmarks.rivals import hf_trainer
from benchmarks.rivals.serve import Work


def finetune(work: Work):
    """Return the loss of each step, with vision features computed once."""
    return hf_trainer.finetune(work, cached=True)
