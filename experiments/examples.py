"""The visual domains and the examples of a config."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import ml_collections

from mllm_jax.data import batching, domains, vqa

Prompts = Literal["activation", "generation", "lens"]
Side: TypeAlias = tuple[domains.Example, domains.Question]  # one input of a pair
# The split of MMNeuron's data sets and the kind of its prompts, by our name of the split.
VQA_SPLITS: dict[str, tuple[str, Prompts]] = {
    "train": ("train", "activation"),
    "test": ("val", "generation"),
    "lens": ("train", "lens"),
}


def domains_of(config: ml_collections.ConfigDict, split: str) -> dict[str, domains.Domain]:
    """Return the domains of a config, by name.

    They are MMNeuron's data sets (`vqa`), the user's own folders (`paths`), or the embedded ones.

    Args:
      config: The settings of the study.
      split: "train" or "test"; of MMNeuron's data sets also "lens", which differs in its prompts.
    """
    if config.get("vqa"):
        return _vqa(config, *VQA_SPLITS[split])
    if config.paths:
        return domains.load_user_domains(config.paths, split)
    return domains.embedded(split, domains=tuple(config.domains) or None)


def examples_of(
    config: ml_collections.ConfigDict, split: str, per_domain: int
) -> list[domains.Example]:
    """Return the first examples of all domains, interleaved by domain."""
    by_domain = domains_of(config, split).values()
    return batching.interleave([list(itertools.islice(d, per_domain)) for d in by_domain])


def pair_up(
    sides: Sequence[Side], fits: Callable[[Side, Side], bool], count: int | None = None
) -> list[tuple[Side, Side]]:
    """Return pairs of examples with their questions, each in one pair at most.

    Args:
      sides: The examples with their questions; each is paired with the first later one that fits.
      fits: Whether two of them make a pair.
      count: The largest number of pairs; all by default.
    """
    pairs: list[tuple[Side, Side]] = []
    remaining = list(sides)
    while remaining and (count is None or len(pairs) < count):
        side = remaining.pop(0)
        for number, other in enumerate(remaining):
            if fits(side, other):
                pairs.append((side, remaining.pop(number)))
                break
    return pairs


def _vqa(
    config: ml_collections.ConfigDict, split: str, prompts: Prompts
) -> dict[str, domains.Domain]:
    names = tuple(config.domains) or vqa.NAMES
    where = {"root": config.vqa.root or None, "size": config.vqa.size}
    if config.vqa.manual:
        for name in names:
            vqa.build(name, config.vqa.manual, **where)
    return {
        name: vqa.load(name, split, model=config.vqa.model, of=prompts, **where) for name in names
    }
