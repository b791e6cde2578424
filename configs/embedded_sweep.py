"""Where the embedded model makes its answers: grids of edits by layer.

python -m experiments.sweep --config=configs/embedded_sweep.py:GRID --workdir=DIR

GRID is tokens (causal tracing by interchange), heads, parts or strengths.
"""

import ml_collections


def get_config(grid: str = "tokens") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.domains = ()  # some of the embedded domains; all five by default
    config.paths = ()  # or own domains: folders, .csv or .jsonl files
    config.grid = grid
    config.strengths = (0.0, 0.5, 1.5, 2.0)
    config.style = "category"
    config.pairs_per_domain = 4
    config.batch_size = 4  # pairs
    return config
