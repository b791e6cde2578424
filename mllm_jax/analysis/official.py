"""What MMNeuron's released code does around the selection, for reproducing its numbers.

The selection itself is `domain_neurons.select(..., compat="official")`, the metrics are in
`mllm_jax.evaluation.metrics.official`, the prompts in `mllm_jax.data.vqa.prompts`. Every
difference from the defaults, and why they differ, is told in docs/official.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mllm_jax.analysis import checks

# The release's names of modules, and the sites where it counts and cuts.
SITES = {
    "lang": "lm.mlp.act",
    "vision": "vision.mlp.act",
    "mmproj": "projector.act",
    "encoder": "vision.mlp.act",
    "qformer": "qformer.mlp.act",
    "query": "qformer.query_mlp.act",
}
# The sets that it evaluates.
EVALUATED = {
    "llava_next": ((), ("lang",), ("vision",), ("mmproj",), ("lang", "vision", "mmproj")),
    "instructblip": (
        (), ("lang",), ("encoder",), ("qformer",), ("encoder", "qformer"),
        ("lang", "encoder", "qformer"),
    ),
}  # fmt: skip
TEMPERATURE = 0.9  # it samples, without a seed
MAX_LENGTH = 512  # of prompt and answer together
GENERATED = 1001  # examples of each domain
COUNTED = 10_001  # at most; see `examples_counted`
SNAPSHOT = 100_000  # vision tokens


def examples_counted(vision_tokens: Iterable[int], every: int = SNAPSHOT) -> int:
    """How many examples of a domain decide its neurons.

    The release writes its counts when the vision tokens read so far first reach a multiple of
    100,000, and identifies neurons from the first of these files alone: about 35 pictures of five
    tiles.

    Args:
        vision_tokens: of each example in order, such as 2885 for five tiles of 577.
        every: tokens between two files.

    Returns:
        Examples in the first file.

    Raises:
        ValueError: that file is never written: too few tokens in 10,001 examples, or one example
            that leads past it.
    """
    total = 0
    for number, count in enumerate(vision_tokens, 1):
        total += count
        if total >= 2 * every:
            raise ValueError(f"example {number} leads from below {every} tokens to {total}")
        if total >= every:
            return number
        if number == COUNTED:
            break
    raise ValueError(f"{total} vision tokens are fewer than {every}: nothing would be counted")


def ablated(modules: Iterable[str]) -> tuple[str, ...]:
    """The modules that the release really cuts when it is told to cut `modules`.

    "vision" cuts the projector too and "qformer" the queries, which is meant. "mmproj" alone cuts
    nothing, which is a typing error in it.
    """
    modules = tuple(modules)
    if unknown := [module for module in modules if module not in SITES]:
        raise ValueError(f"unknown module {unknown[0]!r}; the release has {', '.join(SITES)}")
    along = {"vision": ("vision", "mmproj"), "qformer": ("qformer", "query"), "mmproj": ()}
    return tuple(dict.fromkeys(real for m in modules for real in along.get(m, (m,))))


def max_new_tokens(prompt_tokens: int) -> int:
    """Tokens that it generates at most after a prompt of so many; image tokens count as read."""
    return max(1, MAX_LENGTH - prompt_tokens)


def lists(mask: np.ndarray) -> list[list[np.ndarray]]:
    """The neurons as the release's `identify.py` returns them.

    Args:
        mask: bool[D_, L, F].

    Returns:
        A list over domains of a list over layers of int64 indices. Domains without neurons are
        missing at the end of the list, and there alone.
    """
    mask = checks.mask(mask, "mask")
    last = max(np.flatnonzero(mask.any(axis=(1, 2))), default=-1)
    return [
        [np.flatnonzero(layer).astype(np.int64) for layer in layers] for layers in mask[: last + 1]
    ]
