"""Which part of a model trains. Gradients and optimiser state exist for that part alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

PARTS = {
    "projector": ("projector",),
    "lm": ("lm",),
    "projector+lm": ("projector", "lm"),
}


def split(model: nnx.Module, part: str) -> tuple[Callable, nnx.State, nnx.State]:
    """The model in two: what trains and what is frozen.

    Args:
      part: a name of PARTS.

    Returns:
      merge(trained, frozen) -> model, the trained state, the frozen state.
    """
    if part not in PARTS:
        raise ValueError(f'part="{part}" is none of {", ".join(PARTS)}')
    graph, trained, frozen = nnx.split(model, lambda path, _: path[0] in PARTS[part], ...)
    return (lambda trained, frozen: nnx.merge(graph, trained, frozen)), trained, frozen


def size(state) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))
