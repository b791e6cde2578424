"""How often, and how strongly, each neuron is active in each domain (MMNeuron, facts of A.2.1).

Examples are counted in groups, so that the data can be split, drawn again and shuffled afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

import mllm_jax as mj
from experiments import study
from experiments.neurons.base import MODULES, Study
from mllm_jax import tokens as tok

KINDS = tuple(kind for kind in tok.kind if kind != "answer")
SCOPES = {
    "all": KINDS, "image": ("image",), "text": tok.TEXT, "question": ("question",),
    "system": ("system",),
}  # fmt: skip
FIELDS = ("positive", "sum", "squares", "tokens")


def count(this: Study, name: str) -> dict[str, np.ndarray]:
    """Statistics of one domain, groups of examples first and kinds of token last.

    Returns:
        `MODULE/positive`, `/sum`, `/squares` [groups, L, F, kinds], `/tokens` [groups, kinds] and
        `/kinds`.
    """
    asked = this.asked("train", name)
    groups = this.groups(asked)
    captures = {module: mj.stats(MODULES[module], by=KINDS) for module in this.shapes}

    def one(number: int) -> dict[str, np.ndarray]:
        batches = (asked[i] for i in groups[number])
        label = f"count, {name}, {number + 1} of {len(groups)}"
        total = mj.reduce(captures, this.model, batches, this.edits, label=label)
        found = {f"{m}/{field}": getattr(s, field) for m, s in total.items() for field in FIELDS}
        found |= {f"{module}/tokens": stats.tokens[0] for module, stats in total.items()}
        return found | {f"{m}/kinds": np.array(stats.kinds) for m, stats in total.items()}

    parts = [
        this.workdir.arrays(f"counts/{name}-{number}", functools.partial(one, number))
        for number in range(len(groups))
    ]
    if this.captures:
        total = mj.reduce(
            this.captures, this.model, asked, this.edits,
            save=this.workdir / "steps" / f"captures-{name}.npz", label=f"capture, {name}",
        )  # fmt: skip
        study.write_captures(this.workdir / "captures" / f"{name}.npz", total)
    return {
        key: value if key.endswith("/kinds") else np.stack([part[key] for part in parts])
        for key, value in parts[0].items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """Activations of one module by group of examples. N groups in all, D_ domains.

    Attributes:
        positive: int64[N, L, F], tokens on which a neuron is active.
        sum: float64[N, L, F], of its activations.
        squares: float64[D_, L, F], of their squares.
        tokens: int64[N].
        domain: int64[N].
    """

    positive: np.ndarray
    sum: np.ndarray
    squares: np.ndarray
    tokens: np.ndarray
    domain: np.ndarray

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, np.ndarray]], module: str, scope: str) -> Counts:
        """Those of the tokens of a scope, of all domains.

        Where a module has no token of the scope (the vision tower none of text), all of its count.

        Args:
            found: {domain: what `count` gives}.
            scope: one of SCOPES.
        """
        parts = {field: [] for field in FIELDS}
        for arrays in found.values():
            kinds = [kind in SCOPES[scope] for kind in arrays[f"{module}/kinds"]]
            chosen = np.array(kinds) if any(kinds) else np.ones(len(kinds), bool)
            for field in FIELDS:
                parts[field].append(arrays[f"{module}/{field}"][..., chosen].sum(-1))
        groups = [len(tokens) for tokens in parts["tokens"]]
        return cls(
            positive=np.concatenate(parts["positive"]),
            sum=np.concatenate(parts["sum"]),
            squares=np.stack([squares.sum(0) for squares in parts["squares"]]),
            tokens=np.concatenate(parts["tokens"]),
            domain=np.repeat(np.arange(len(groups)), groups),
        )
