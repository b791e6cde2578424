"""The steps of MMNeuron's released code around the selection, for reproducing its numbers.

The selection itself is `domain_neurons.select(..., compat="official")`, the metrics are in
`mllm_jax.evaluation.metrics.official`, the prompts in `mllm_jax.data.vqa.prompts`.
docs/official.md explains every difference from the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mllm_jax.analysis import checks

# The release's names of modules, and the sites where it counts activations and sets them to 0.
SITES = {
    "lang": "lm.mlp.act",
    "vision": "vision.mlp.act",
    "mmproj": "projector.act",
    "encoder": "vision.mlp.act",
    "qformer": "qformer.mlp.act",
    "query": "qformer.query_mlp.act",
}
TEMPERATURE = 0.9  # it samples without a seed
MAX_LENGTH = 512  # tokens of prompt and answer together
COUNTED = 10_001  # largest number of examples that it counts; see `examples_counted`
SNAPSHOT = 100_000  # vision tokens between two files of counts


def examples_counted(vision_tokens: Iterable[int], every: int = SNAPSHOT) -> int:
    """Count the examples of a domain from which the release identifies its neurons.

    The release writes its counts when the number of vision tokens first reaches a multiple of
    100,000, and identifies neurons from the first of these files alone: about 35 pictures of five
    tiles.

    Args:
      vision_tokens: Number of vision tokens of each example, in order, such as 2885 for five
        tiles of 577.
      every: Number of tokens between two files.

    Returns:
      The number of examples in the first file.

    Raises:
      ValueError: This file is never written: there are too few tokens in 10,001 examples, or one
        example skips it.
    """
    total = 0
    for number, count in enumerate(vision_tokens, 1):
        total += count
        if total >= 2 * every:
            raise ValueError(
                f"example {number} skips {every}: it leads from fewer tokens to {total}"
            )
        if total >= every:
            return number
        if number == COUNTED:
            break
    raise ValueError(f"{total} vision tokens are fewer than {every}: nothing would be counted")


def ablated(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that the release ablates when it is given `modules`.

    "vision" also ablates the projector and "qformer" the queries, which is intended. "mmproj" alone
    ablates nothing, because of a typing error in the release.
    """
    modules = tuple(modules)
    if unknown := [module for module in modules if module not in SITES]:
        raise ValueError(f"unknown module {unknown[0]!r}; the release has {', '.join(SITES)}")
    along = {"vision": ("vision", "mmproj"), "qformer": ("qformer", "query"), "mmproj": ()}
    return tuple(dict.fromkeys(real for m in modules for real in along.get(m, (m,))))


def max_new_tokens(prompt_tokens: int) -> int:
    """Return the release's limit of new tokens after a prompt, with expanded image tokens."""
    return max(1, MAX_LENGTH - prompt_tokens)


def lists(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Return the neurons in the form of the release's `identify.py`.

    Args:
      mask: bool[D_, L, F], the neurons of each domain.

    Returns:
      A list over domains of lists over layers of int64 indices. Domains without neurons are
      missing at the end of the list only.
    """
    mask = checks.mask(mask, "mask")
    last = max(np.flatnonzero(mask.any(axis=(1, 2))), default=-1)
    return [
        [np.flatnonzero(layer).astype(np.int64) for layer in layers] for layers in mask[: last + 1]
    ]
