"""Count how often, and how strongly, each neuron is active in each domain.

Examples are counted in groups, so that the data can be split, resampled and shuffled afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

import mllm_jax as mj
from experiments import context
from experiments.domain_neurons.context import Prompts, Study
from experiments.modules import MODULES
from mllm_jax import tokens as tok

KINDS = tuple(kind for kind in tok.kind if kind != "answer")
Scope = Literal["all", "image", "text", "question", "system"]
SCOPES: dict[Scope, tuple[str, ...]] = {
    "all": KINDS, "image": ("image",), "text": tok.TEXT, "question": ("question",),
    "system": ("system",),
}  # fmt: skip
FIELDS = ("positive", "sum", "centred", "tokens")


def count(study: Study, name: str, prompts: Prompts) -> dict[str, np.ndarray]:
    """Return the activation statistics of a domain.

    Args:
      study: The study.
      name: The name of the domain.
      prompts: The prompts of its pictures.

    Returns:
      `MODULE/positive`, `MODULE/sum` and `MODULE/centred` [groups, L, F, kinds], `MODULE/tokens`
      [groups, kinds], and `MODULE/kinds`.
    """
    questions = study.questions("train", name, prompts)
    groups = study.groups(questions)
    captures = {module: mj.stats(MODULES[module], by=KINDS) for module in study.shapes}

    def count_group(number: int) -> dict[str, np.ndarray]:
        batches = (questions[i] for i in groups[number])
        label = f"count, {name}, {prompts} prompts, {number + 1} of {len(groups)}"
        total = mj.reduce(captures, study.model, batches, study.edits, label=label)
        arrays = {f"{m}/{field}": getattr(s, field) for m, s in total.items() for field in FIELDS}
        arrays |= {f"{module}/tokens": stats.tokens[0] for module, stats in total.items()}
        return arrays | {f"{m}/kinds": np.array(stats.kinds) for m, stats in total.items()}

    parts = [
        study.workdir.arrays(
            f"counts/{prompts}/{name}-{number}", functools.partial(count_group, number)
        )
        for number in range(len(groups))
    ]
    if study.captures and prompts == study.config.prompts:
        total = mj.reduce(
            study.captures, study.model, questions, study.edits,
            save=study.workdir / "steps" / f"captures-{name}.npz", label=f"capture, {name}",
        )  # fmt: skip
        context.write_captures(study.workdir / "captures" / f"{name}.npz", total)
    return {
        key: value if key.endswith("/kinds") else np.stack([part[key] for part in parts])
        for key, value in parts[0].items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """The activations of one module by group of examples: N groups in all, D_ domains.

    Attributes:
      positive: int64[N, L, F], the number of tokens on which a neuron is active.
      sum: float64[N, L, F], the sum of its activations.
      centred: float64[D_, L, F], the sum of their squared deviations from the domain's mean.
      tokens: int64[N], the number of tokens.
      domain: int64[N], the index of the domain.
    """

    positive: np.ndarray
    sum: np.ndarray
    centred: np.ndarray
    tokens: np.ndarray
    domain: np.ndarray

    @classmethod
    def of(
        cls, counted: Mapping[str, Mapping[str, np.ndarray]], module: str, scope: Scope
    ) -> Counts:
        """Return the counts over the tokens of a scope, of all domains.

        A module without tokens of the scope is counted over all its tokens: the vision tower has
        no text tokens.

        Args:
          counted: The results of `count`, by domain.
          module: The name of the module.
          scope: The tokens to count.
        """
        parts: dict[str, list[np.ndarray]] = {field: [] for field in FIELDS}
        for arrays in counted.values():
            kinds = [kind in SCOPES[scope] for kind in arrays[f"{module}/kinds"]]
            chosen = np.array(kinds) if any(kinds) else np.ones(len(kinds), bool)
            selected = {field: arrays[f"{module}/{field}"][..., chosen] for field in FIELDS}
            for field in ("positive", "sum", "tokens"):
                parts[field].append(selected[field].sum(-1))
            parts["centred"].append(
                pool_centred(selected["sum"], selected["centred"], selected["tokens"])
            )
        groups = [len(tokens) for tokens in parts["tokens"]]
        return cls(
            positive=np.concatenate(parts["positive"]),
            sum=np.concatenate(parts["sum"]),
            centred=np.stack(parts["centred"]),
            tokens=np.concatenate(parts["tokens"]),
            domain=np.repeat(np.arange(len(groups)), groups),
        )


def pool_centred(sums: np.ndarray, centred: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the squared deviations from the common mean of several sets of tokens.

    Args:
      sums: float64[groups, L, F, kinds], the sums of the activations of each set.
      centred: float64[groups, L, F, kinds], the sums of squared deviations from its mean.
      tokens: int64[groups, kinds], its number of tokens.

    Returns:
      float64[L, F].
    """
    count = tokens[:, None, None]
    means = sums / np.maximum(count, 1)
    mean = sums.sum((0, -1)) / max(tokens.sum(), 1)
    between = count * (means - mean[..., None]) ** 2
    return (centred + between).sum((0, -1))
