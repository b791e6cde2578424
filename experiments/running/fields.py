"""The values that the fields of every study's config can have, checked before JAX is imported.

A field of a name has one meaning in all studies; a nested one is checked by its own name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mllm_jax.arguments import require_number, require_whole

# Whole numbers, by the least of them.
LEAST = dict.fromkeys(
    (
        "accumulate", "auroc_pictures", "batch", "batch_size", "circuit", "deviation_layers",
        "epochs", "every", "evidence_per_domain", "groups", "held_per_task", "jacobian_batch_size",
        "lens_per_domain", "new_tokens", "pairs_per_domain", "picture_layers", "questions", "rank",
        "resamples", "rows", "splits", "test_pairs", "test_per_domain", "test_per_task", "tokens",
        "train_per_domain", "train_per_task", "vectors",
    ),
    1,
) | dict.fromkeys(
    (
        "controls", "division", "draws", "edges", "entropy_controls", "evidence_exact",
        "evidence_neurons", "exact_nodes", "exact_pairs", "experts", "jacobian_per_domain",
        "random_controls", "seed", "shown", "shuffles", "steps", "top", "train_tokens",
    ),
    0,
)  # fmt: skip
MOST = {"warmup": 1.0} | dict.fromkeys(
    ("clip", "penalty", "projector_rate", "rate", "weight_decay"), math.inf
)  # numbers from 0
SHARES = "level", "margin"  # above 0 and below 1
QUANTILES = "bar_rate", "filter_rate", "top_rate"  # above 0 and up to 1
NEEDED = "seeds", "sizes", "strengths"  # lists of one value or more


def check(config: Any) -> None:
    """Refuse values that no study can use, and combinations of which one is not used.

    Raises:
      ValueError: A value is wrong.
    """
    for field, value in _leaves(config, "config"):
        _check_value(field, field.rpartition(".")[2], value)
    if config.get("paths") and config.get("domains"):
        raise ValueError(
            "config.domains: it names embedded domains, which config.paths replaces; give one"
        )


def _leaves(config: Any, field: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from _leaves(value, f"{field}.{name}")
        else:
            yield f"{field}.{name}", value


def _check_value(field: str, name: str, value: Any) -> None:
    """Check a value by the name of its field; texts and None are no numbers."""
    if value is None or isinstance(value, str):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field}={value} is not a finite number")
    if isinstance(value, tuple | list):
        if name in NEEDED and not value:
            raise ValueError(f"{field} is empty: give one value or more")
        if twice := [str(v) for i, v in enumerate(value) if v in value[:i]]:
            raise ValueError(f"{field} lists {twice[0]} twice")
        for seed in value if name == "seeds" else ():
            require_whole(field, seed, 0)
    elif name in LEAST:
        require_whole(field, value, LEAST[name])
    elif name in MOST:
        require_number(field, value, MOST[name])
    elif name in SHARES and not 0 < value < 1:
        raise ValueError(f"{field}={value} lies outside (0, 1); 0.05 means five percent")
    elif name in QUANTILES and not 0 < value <= 1:
        raise ValueError(f"{field}={value} lies outside (0, 1]; 0.01 means one percent")
