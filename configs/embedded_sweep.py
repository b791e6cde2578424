"""Grids of edits by layer that locate the computation of the embedded model's answers.

python -m experiments.sweep --config=configs/embedded_sweep.py:GRID --workdir=DIR

GRID is tokens (causal tracing by interchange), heads, parts or strengths.
"""

import ml_collections

from configs import base


def get_config(grid: str = "tokens") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    config = base.embedded()
    config.grid = grid
    config.strengths = (0.0, 0.5, 1.5, 2.0)
    config.style = "category"
    config.pairs_per_domain = 4
    config.batch_size = 4  # pairs
    return config
