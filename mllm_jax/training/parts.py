"""Partition a model into trained and frozen parts. Only trained parts have optimiser state.

    merge, trained, frozen = parts.partition(model, "projector+lora", lora=parts.Lora(rank=16))
    merge(trained, frozen)    # the model; a loss need not know which part of it trains

A part is a whole module, or a change of frozen weights: low-rank products that are added to
matrices, or the weights of single neurons, which replace their columns and rows. The gradient of a
matrix with such neurons exists as a whole while a step is computed, and is not kept.

Trained parameters are float32 for every model, as are their gradients and the optimiser's moments:
a step at a learning rate of 2e-5 is below the resolution of bfloat16. They are cast to the model's
dtype where they enter the pass. This takes 12 bytes per trained parameter, for the weight and two
moments, and 4 for the gradient during a step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.models.layers import LowRank
from mllm_jax.numerics import precision

MODULES = ("projector", "lm")
PARTS = (*MODULES, "lora", "neurons")
MLP = "lm.layers.mlp.{}.kernel"

Weights = dict[str, Any]  # arrays, or `LowRank`, by dotted name: lm.layers.attn.q.kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021): W + alpha / rank * A B, without dropout.

    A is uniform within 1 / sqrt(inputs), B is zero: at the start the model is unchanged.

    Attributes:
      rank: Number of columns of A.
      alpha: Scale of the product, times the rank.
      matrices: A regular expression for the full names of the weights; by default all matrices of
        the LM's layers, as in LLaVA's recipe.
    """

    rank: int = 8
    alpha: float = 16.0
    matrices: str = r"lm\.layers\..*\.kernel"

    def start(self, weights: Weights, seed: int) -> dict[str, dict[str, jax.Array]]:
        """Return A float32[L, n, rank] and B float32[L, rank, m] of each chosen float[L, n, m]."""
        names = sorted(name for name in weights if re.fullmatch(self.matrices, name))
        if not names:
            usual = ", ".join(name for name in weights if re.fullmatch(Lora.matrices, name))
            raise ValueError(f"no weight is named {self.matrices}; known are {usual}")
        rng, low = np.random.default_rng(seed), {}
        for name in names:
            *stack, n, m = weights[name].shape
            dtype = precision.at_least_float32_dtype(weights[name].dtype)
            a = rng.uniform(-1, 1, (*stack, n, self.rank)) / math.sqrt(n)
            low[name] = {"a": jnp.asarray(a, dtype), "b": jnp.zeros((*stack, self.rank, m), dtype)}
        return low

    def put(self, weights: Weights, low: dict[str, dict[str, jax.Array]]) -> dict[str, Any]:
        """Return the weights with each low-rank product beside its matrix."""
        scale = self.alpha / self.rank
        return weights | {
            name: LowRank(weights[name], **pair, scale=scale) for name, pair in low.items()
        }


def _neurons_start(
    weights: Weights, masks: Mapping[str, np.ndarray]
) -> tuple[Weights, dict[str, dict[str, jax.Array]]]:
    """Return the weights float[n, D] of the chosen neurons of each matrix, and their indices."""
    own, at = {}, {}
    for matrix, mask in masks.items():
        if matrix not in ("gate", "up", "down"):
            raise ValueError(f"neurons of {matrix!r}: the matrices of an MLP are gate, up and down")
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


def _neurons_put(weights: Weights, own: Weights, at: dict[str, dict[str, jax.Array]]) -> Weights:
    """Return the weights with those of the chosen neurons replaced."""
    changed = {}
    for matrix, rows in own.items():
        name, (layer, neuron) = MLP.format(matrix), (at[matrix]["layer"], at[matrix]["neuron"])
        # A neuron is a column of gate and up, [L, D, F], and a row of down, [L, F, D].
        matrices = weights[name].at
        place = matrices[layer, neuron] if matrix == "down" else matrices[layer, :, neuron]
        changed[name] = place.set(rows.astype(weights[name].dtype), unique_indices=True)
    return weights | changed


@dataclasses.dataclass(frozen=True)
class Merge:
    """A function merge(trained, frozen) -> model; equal for models of one structure, for `jit`.

    Attributes:
      structure: The tree of the model.
      names: Names of its weights, in order.
      dtypes: Dtypes of its weights, in order.
      lora: The low-rank adaptation that `partition` was given.
    """

    structure: jax.tree_util.PyTreeDef
    names: tuple[str, ...]
    dtypes: tuple[np.dtype, ...]
    lora: Lora

    def __call__(self, trained: dict[str, Any], frozen: dict[str, Any]) -> Any:
        """Return the model; each weight is an array of its own dtype."""
        model = self.for_pass(trained, frozen)
        return jax.tree.map(
            lambda weight: weight[...] if isinstance(weight, LowRank) else weight,
            model, is_leaf=lambda node: isinstance(node, LowRank),
        )  # fmt: skip

    def for_pass(self, trained: dict[str, Any], frozen: dict[str, Any]) -> Any:
        """Return the model for a pass: low-rank products stay beside their matrices."""
        weights = dict(frozen["weights"])
        for module in MODULES:
            weights |= trained.get(module, {})
        if "lora" in trained:
            weights = self.lora.put(weights, trained["lora"])
        if "neurons" in trained:
            weights = _neurons_put(weights, trained["neurons"], frozen["neurons"])
        leaves = [
            weight if isinstance(weight, LowRank) else weight.astype(dtype)
            for weight, dtype in zip((weights[n] for n in self.names), self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)


class Partition(NamedTuple):
    """A model in two parts.

    Attributes:
      merge: (trained, frozen) -> the model.
      trained: The arrays that train, by part and name, in float32 or wider.
      frozen: All other arrays, unchanged.
    """

    merge: Merge
    trained: dict[str, Any]
    frozen: dict[str, Any]


def partition(
    model,
    part: str,
    *,
    lora: Lora | None = None,
    neurons: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Partition:
    """Divide a model into trained and frozen parameters.

    Args:
      model: The model, or the shapes of one.
      part: One of PARTS, or several joined by "+": "projector+lora".
      lora: The matrices of a low-rank adaptation, and its rank.
      neurons: {"up": bool[L, F], "down": bool[L, F]}, the trained neurons of the LM's MLPs. Each
        has a row of `up_proj` and a column of `down_proj` (NeFT, Xu et al. 2024).
      seed: Seed of the low-rank arrays.

    Raises:
      ValueError: The part is unknown, trains weights twice, or lacks what it needs.
    """
    chosen = part.split("+")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise ValueError(f'part="{part}": {unknown[0]} is not one of {", ".join(PARTS)}')
    if "lm" in chosen and len({"lora", "neurons"} & set(chosen)):
        raise ValueError(f'part="{part}" trains weights of the LM twice: leave one of them out')
    if ("neurons" in chosen) != (neurons is not None):
        raise ValueError(f'part="{part}" {"needs" if neurons is None else "takes no"} neurons=')
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    weights = {weight_name(path): leaf for path, leaf in leaves}
    dtypes = tuple(leaf.dtype for leaf in weights.values())
    merge = Merge(structure, tuple(weights), dtypes, lora or Lora())
    _require(part, weights, merge.lora, neurons or ())
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


def _require(part: str, weights: Weights, lora: Lora, matrices: Iterable[str]) -> None:
    """Check that a model has each module of a part, and that no matrix trains in two ways.

    Args:
      part: The part.
      weights: All weights of the model.
      lora: The low-rank adaptation.
      matrices: The matrices whose neurons train: gate, up or down.
    """
    chosen = part.split("+")
    for module in MODULES:
        if module in chosen and not any(name.startswith(f"{module}.") for name in weights):
            raise ValueError(f'part="{part}": this model has no {module}')
    names = [MLP.format(matrix) for matrix in matrices]
    both = [name for name in names if "lora" in chosen and re.fullmatch(lora.matrices, name)]
    if both:
        raise ValueError(
            f'part="{part}" trains {" and ".join(both)} twice: leave the matrices of neurons= out '
            r"of lora.matrices, as lm\.layers\.attn\..*\.kernel does"
        )


def _widened(leaf: Any) -> Any:
    """Return an array, or the shape of one, in float32 or wider."""
    dtype = precision.at_least_float32_dtype(leaf.dtype)
    if leaf.dtype == dtype:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf.astype(dtype)


def decays(trained: dict[str, Any]) -> dict[str, Any]:
    """Return whether weight decay applies to each trained array.

    Matrices decay, including word embeddings, low-rank products and neurons; biases and scales of
    norms do not. This is the rule of the trainer of transformers, which LLaVA was trained with.
    """

    def has_decay(path: tuple[Any, ...], leaf: Any) -> bool:
        return weight_name(path).rsplit(".", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(has_decay, trained)


def weight_name(path: tuple[Any, ...]) -> str:
    """Return the dotted name of a weight from its path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def size(tree: Any) -> int:
    """Return the total number of elements of a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
