"""What trains of a model. Gradients and optimiser state exist for that alone.

    merge, trained, frozen = parts.split(model, "projector+lora", lora=parts.Lora(rank=16))
    merge(trained, frozen)    # the model, inside of a loss too: it need not know how it is trained

A part is a module as a whole, or a change of weights that are frozen themselves: low-rank products
that are added to matrices, or some neurons' own weights that are put into theirs. The gradient of
a matrix with neurons that train exists as a whole while a step is computed, and is not kept.

What trains is float32 whatever the model is, as its gradient and the optimiser's moments are: a
step at a rate of 2e-5 is less than a bfloat16 weight can tell. It is cast to the model's dtype
where it enters the pass. That takes 12 bytes a trained number, for weight and two moments, and 4
for the gradient while a step is computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.models.layers import LowRank
from mllm_jax.numerics import precision

MODULES = ("projector", "lm")
PARTS = (*MODULES, "lora", "neurons")
MLP = "lm.layers.mlp.{}.kernel"

Weights = dict[str, jax.Array]  # by dotted name: lm.layers.attn.q.kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021): W + alpha / rank * A B, without dropout.

    A is uniform within 1 / sqrt(inputs), B is zero: at the start the model is what it was.

    Attributes:
      rank: columns of A.
      alpha: times 1 / rank is the weight of the product.
      matrices: a regular expression that the whole names of the weights match; by default all of
        the LM's layers, as LLaVA's recipe has it.
    """

    rank: int = 8
    alpha: float = 16.0
    matrices: str = r"lm\.layers\..*\.kernel"

    def start(self, weights: Weights, seed: int) -> dict[str, dict[str, jax.Array]]:
        """A float32[L, n, rank] and B float32[L, rank, m] of each chosen float[L, n, m]."""
        names = sorted(name for name in weights if re.fullmatch(self.matrices, name))
        if not names:
            raise ValueError(f"no weight is named {self.matrices}; there are {', '.join(weights)}")
        rng, low = np.random.default_rng(seed), {}
        for name in names:
            *stack, n, m = weights[name].shape
            dtype = precision.at_least_float32_dtype(weights[name].dtype)
            a = rng.uniform(-1, 1, (*stack, n, self.rank)) / math.sqrt(n)
            low[name] = {"a": jnp.asarray(a, dtype), "b": jnp.zeros((*stack, self.rank, m), dtype)}
        return low

    def put(self, weights: Weights, low: dict[str, dict[str, jax.Array]]) -> dict[str, Any]:
        """The weights with the products beside their matrices."""
        scale = self.alpha / self.rank
        return weights | {
            name: LowRank(weights[name], **pair, scale=scale) for name, pair in low.items()
        }


def _neurons_start(weights: Weights, masks: Mapping[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """float[n, D], the weights of the chosen neurons of each matrix; and (layers, neurons) each."""
    own, at = {}, {}
    for matrix, mask in masks.items():
        if matrix not in ("gate", "up", "down"):
            raise ValueError(f"neurons of {matrix!r}: an MLP has gate, up and down")
        weight, mask = weights[MLP.format(matrix)], np.asarray(mask)
        L, F = weight.shape[0], weight.shape[1 if matrix == "down" else 2]
        if mask.shape != (L, F) or mask.dtype != bool or not mask.any():
            raise ValueError(
                f"neurons of {matrix}: expected bool[{L}, {F}] with some of them True, got "
                f"{mask.dtype}{list(mask.shape)} with {int(mask.astype(bool).sum())}"
            )
        layer, neuron = (jnp.asarray(index, jnp.int32) for index in np.nonzero(mask))
        at[matrix] = {"layer": layer, "neuron": neuron}
        rows = weight[layer, neuron] if matrix == "down" else weight[layer, :, neuron]
        own[matrix] = precision.at_least_float32(rows)
    return own, at


def _neurons_put(weights: Weights, own: Weights, at: dict[str, Any]) -> Weights:
    """The weights with those of the chosen neurons in their places."""
    changed = {}
    for matrix, rows in own.items():
        name, (layer, neuron) = MLP.format(matrix), (at[matrix]["layer"], at[matrix]["neuron"])
        # A neuron is a column of gate and up, [L, D, F], and a row of down, [L, F, D].
        place = weights[name].at
        place = place[layer, neuron] if matrix == "down" else place[layer, :, neuron]
        changed[name] = place.set(rows.astype(weights[name].dtype), unique_indices=True)
    return weights | changed


@dataclasses.dataclass(frozen=True)
class Merge:
    """merge(trained, frozen) -> the model. Two of one structure are equal: jit compiles once.

    Attributes:
      structure: of the model. names, dtypes: of its weights, in order.
      lora: as `split` was given it.
    """

    structure: jax.tree_util.PyTreeDef
    names: tuple[str, ...]
    dtypes: tuple[np.dtype, ...]
    lora: Lora

    def __call__(self, trained: dict[str, Any], frozen: dict[str, Any]) -> Any:
        """The model, each weight an array of its own dtype."""
        model = self.for_pass(trained, frozen)
        return jax.tree.map(
            lambda weight: weight[...] if isinstance(weight, LowRank) else weight,
            model, is_leaf=lambda node: isinstance(node, LowRank),
        )  # fmt: skip

    def for_pass(self, trained: dict[str, Any], frozen: dict[str, Any]) -> Any:
        """The model to compute with: low-rank products stay beside their matrices."""
        weights = dict(frozen["weights"])
        for module in MODULES:
            weights |= trained.get(module, {})
        if "lora" in trained:
            weights = self.lora.put(weights, trained["lora"])
        if "neurons" in trained:
            weights = _neurons_put(weights, trained["neurons"], frozen["neurons"])
        leaves = [
            weight if isinstance(weight, LowRank) else weight.astype(dtype)
            for weight, dtype in zip(map(weights.get, self.names), self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


class Partition(NamedTuple):
    """A model in two.

    Attributes:
      merge: (trained, frozen) -> the model.
      trained: by part, arrays by name, in float32 or better. frozen: all else, as it was.
    """

    merge: Merge
    trained: dict[str, Any]
    frozen: dict[str, Any]


def partition(
    model,
    part: str,
    *,
    lora: Lora | None = None,
    neurons: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Partition:
    """What trains of a model, and what is frozen.

    Args:
      part: one of PARTS, or several with "+" between them: "projector+lora".
      lora: which matrices, and the rank.
      neurons: {"up": bool[L, F], "down": bool[L, F]}, of the LM's MLPs: whose weights train. A
        neuron has its own row of `up_proj` and column of `down_proj` (NeFT, Xu et al. 2024).
      seed: of the low-rank arrays.
    """
    chosen = part.split("+")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise ValueError(f'part="{part}": {unknown[0]} is none of {", ".join(PARTS)}')
    if "lm" in chosen and len({"lora", "neurons"} & set(chosen)):
        raise ValueError(f'part="{part}" trains weights of the LM twice: leave one of them out')
    if ("neurons" in chosen) != (neurons is not None):
        raise ValueError(f'part="{part}" goes {"with" if neurons is None else "without"} neurons=')
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    weights = {weight_name(path): leaf for path, leaf in leaves}
    dtypes = tuple(leaf.dtype for leaf in weights.values())
    merge = Merge(structure, tuple(weights), dtypes, lora or Lora())
    trained: dict[str, Any] = {
        module: {
            name: _widened(weights.pop(name))
            for name in merge.names
            if name.startswith(f"{module}.")
        }
        for module in MODULES
        if module in chosen
    }
    frozen: dict[str, Any] = {"weights": weights}
    if "lora" in chosen:
        trained["lora"] = merge.lora.start(weights, seed)
    if neurons is not None:
        trained["neurons"], frozen["neurons"] = _neurons_start(weights, neurons)
    return Partition(merge, trained, frozen)


def _widened(leaf):
    """An array, or the shape of one, in float32 or better: itself, if it is."""
    dtype = precision.at_least_float32_dtype(leaf.dtype)
    if leaf.dtype == dtype:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf.astype(dtype)


def decays(trained: dict[str, Any]) -> dict[str, Any]:
    """Of each array that trains, whether weight decay is for it: not for biases and norms' scales.

    Matrices decay, those of word embeddings, low-rank products and neurons too: as in the trainer
    of transformers, which LLaVA was trained with.
    """

    def one(path, leaf) -> bool:
        return weight_name(path).rsplit(".", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(one, trained)


def weight_name(path) -> str:
    """The dotted name of a weight, from its path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def size(tree) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
