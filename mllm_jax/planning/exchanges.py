"""Describe the arrays that chips exchange, by the shapes of the network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from mllm_jax.models.multimodal import MultimodalModel
from mllm_jax.planning import hlo
from mllm_jax.planning.hlo_collectives import Collective
from mllm_jax.planning.placement import parameter_shapes

SMALL_BYTES = 2**16  # an array below this size is a statistic or an index, whatever its shape


def group_collectives(
    collectives: Iterable[Collective], subject: Callable[[hlo.Array], str]
) -> tuple[dict[str, Any], ...]:
    """Merge equal collectives, and return the most expensive first.

    Args:
      collectives: The collectives of a program.
      subject: The function that `classifier` returns.
    """
    entries: dict[tuple[str, str, int], dict[str, Any]] = {}
    for c in collectives:
        key = c.kind, str(c.array), c.group
        entry = {
            "kind": c.kind, "of": subject(c.array), "array": str(c.array), "group": c.group,
            "times": 0, "received": c.received, "source": c.source,
        }  # fmt: skip
        entries.setdefault(key, entry)["times"] += c.times
    return tuple(sorted(entries.values(), key=lambda c: -c["received"] * c["times"]))


def classifier(network: MultimodalModel, mesh: Mesh | AbstractMesh) -> Callable[[hlo.Array], str]:
    """Return a function that returns the role of an exchanged array by its shape.

    The names are: numbers (a few bytes), indices, layer (the weights of one layer), weights
    (outside of layers), stack (the weights of all layers), vocabulary (its matrix, or logits) and
    activation. Under `fsdp` an array that is complete except for the sharding over `model` is in
    use: there a matrix of the vocabulary counts as weights, and an attention matrix as a layer even
    if its heads are a separate axis.
    """
    shares = {math.prod(s) for s in itertools.product(*((1, n) for n in mesh.shape.values()))}
    shapes = parameter_shapes(network)
    lm, model = network.config.lm, mesh.shape["model"]
    vocab = lm.vocab
    used: dict[tuple[int, ...], str] = {}
    if mesh.shape["fsdp"] > 1:  # with the axes in any order
        used = {tuple(sorted((vocab // model, lm.width))): "weights"}
        for heads in (lm.heads, lm.kv_heads):
            used[tuple(sorted((heads // model, lm.head_width, lm.width)))] = "layer"
    stacked = {s for name, s in shapes.items() if ".layers." in name or ".look." in name}
    known = {
        "vocabulary": {s for s in shapes.values() if vocab in s},
        "layer": {s[1:] for s in stacked},
        "stack": stacked,
        "weights": set(shapes.values()) - stacked,
    }

    def is_share(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        return len(dims) == len(shape) and any(
            all(n // d in shares and n % d == 0 for d, n in zip(dims, order, strict=True))
            for order in itertools.permutations(shape)
        )

    def subject(array: hlo.Array) -> str:
        dims = tuple(n for n in array.shape if n > 1)
        if array.bytes < SMALL_BYTES:
            return "numbers"
        if array.dtype[0] in "su" or array.dtype == "pred":
            return "indices"
        if word := used.get(tuple(sorted(dims))):
            return word
        for word, candidates in known.items():
            if any(is_share(dims, shape) for shape in candidates):
                return word
        return "vocabulary" if vocab in dims else "activation"

    return subject
