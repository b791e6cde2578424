"""Which parameter is split along which axis: a table for each architecture, in axis letters.

A rule is a pattern of dotted paths and a PartitionSpec of axis letters (`axes.LETTERS`); `None` is
an axis that is never split. What a letter means on a mesh is said once, in `SPLIT`:

* heads, neurons and vocabulary over `model`, as Megatron-LM does (Shoeybi et al. 2019): one
  reduction after attention, one after the MLP;
* the other axis of each matrix over `fsdp`: a device holds a share of every layer and gathers the
  one in use (ZeRO 3, Rajbhandari et al. 2020).

The `data` axis holds copies. Layers are stacked on the axis L, which is never split: a scan takes
one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

Rule = tuple[str, P]
Shape = tuple[int, ...]

SPLIT = dict.fromkeys("NKFV", "model") | dict.fromkeys("DEW", "fsdp")


def _attention(path: str, width: str, source: str, kv: str = "N") -> tuple[Rule, ...]:
    """The rules of an attention that maps a source into what has this width."""
    return (
        (rf"{path}\.q\.kernel", P("L", width, "N")),
        (rf"{path}\.q\.bias", P("L", "N")),
        (rf"{path}\.[kv]\.kernel", P("L", source, kv)),
        (rf"{path}\.[kv]\.bias", P("L", kv)),
        (rf"{path}\.o\.kernel", P("L", "N", width)),
        (rf"{path}\.o\.bias", P("L", None)),
    )


def _mlp(path: str, width: str) -> tuple[Rule, ...]:
    return (
        (rf"{path}\.(gate|up)\.kernel", P("L", width, "F")),
        (rf"{path}\.(gate|up)\.bias", P("L", "F")),
        (rf"{path}\.down\.kernel", P("L", "F", width)),
        (rf"{path}\.down\.bias", P("L", None)),
    )


VISION = (
    (r"vision\.patch\.kernel", P(None, "E")),
    (r"vision\.patch\.bias", P(None)),
    (r"vision\.cls", P()),
    (r"vision\.position", P(None, None)),
    (r"vision\.(pre_)?norm\.(scale|bias)", P(None)),
    (r"vision\.layers\.norm[12]\.(scale|bias)", P("L", None)),
    *_attention(r"vision\.layers\.attn", "E", "E"),
    *_mlp(r"vision\.layers\.mlp", "E"),
)

QFORMER = (
    (r"qformer\.(queries|words|position)", P(None, None)),
    (r"qformer\.norm\.(scale|bias)", P(None)),
    (r"qformer\.(layers\.\w+|look)\.norm\.(scale|bias)", P("L", None)),
    *_attention(r"qformer\.layers\.attn", "W", "W"),
    *_attention(r"qformer\.look", "W", "E"),
    *_mlp(r"qformer\.layers\.(query_)?mlp", "W"),
)

LLAMA = (
    (r"lm\.embed", P("V", "D")),
    (r"lm\.norm\.scale", P(None)),
    (r"lm\.head\.kernel", P("D", "V")),
    (r"lm\.layers\.(attn|mlp)_norm\.scale", P("L", None)),
    *_attention(r"lm\.layers\.attn", "D", "D", kv="K"),
    *_mlp(r"lm\.layers\.mlp", "D"),
)


def projector(depth: int) -> tuple[Rule, ...]:
    """The rules of a projector of `depth` linear maps.

    The first makes neurons, each later one reads those of all devices and sums.
    """
    if depth == 1:
        return (
            (r"projector\.linears\.0\.kernel", P("W", None)),
            (r"projector\.linears\.0\.bias", P(None)),
        )
    return (
        (r"projector\.linears\.0\.kernel", P("E", "F")),
        (r"projector\.linears\.0\.bias", P("F")),
        (r"projector\.linears\.[1-9]\d*\.kernel", P("F", "D")),
        (r"projector\.linears\.[1-9]\d*\.bias", P(None)),
    )


def match(paths: Iterable[str], table: Iterable[Rule]) -> dict[str, P]:
    """Path -> PartitionSpec in axis letters.

    Args:
        paths: dotted, of parameters.
        table: of the architecture.

    Raises:
        ValueError: all parameters that match no rule, or more than one.
    """
    table = tuple(table)
    found = {path: [rule for rule in table if re.fullmatch(rule[0], path)] for path in paths}
    none = [path for path, hits in found.items() if not hits]
    several = [
        f"{path} ({' and '.join(pattern for pattern, _ in hits)})"
        for path, hits in found.items()
        if len(hits) > 1
    ]
    parts = [
        f"{words}: {', '.join(paths)}"
        for words, paths in (
            ("parameters without a sharding rule", none),
            ("parameters with more than one", several),
        )
        if paths
    ]
    if parts:
        raise ValueError(f"{'; '.join(parts)}; every parameter needs one (mllm_jax.sharding.rules)")
    return {path: hits[0][1] for path, hits in found.items()}


def specs(
    config,
    table: Iterable[Rule],
    shapes: Mapping[str, Shape],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> dict[str, P]:
    """Path -> PartitionSpec on a mesh.

    An axis that the mesh does not divide stays whole; heads are divided as heads, never one in two.

    Args:
        config: of the model: how many heads there are.
        table: of its architecture.
        shapes: dotted path -> shape, of all parameters, L axis included.
        mesh: of `mesh.mesh`; an abstract one will do.

    Raises:
        ValueError: a parameter without a rule or with two.
    """
    return {
        path: P(
            *(
                _axis(letter, _count(config, path, letter) or n, mesh)
                for letter, n in zip(spec, shapes[path], strict=False)
            )
        )
        for path, spec in match(shapes, table).items()
    }


def _axis(letter: str | None, count: int, mesh) -> str | None:
    axis = SPLIT.get(letter)
    return axis if axis and mesh.shape[axis] > 1 and count % mesh.shape[axis] == 0 else None


def _count(config: Any, path: str, letter: str | None) -> int | None:
    """How many heads an axis holds, of all that attend in this module; None for other axes."""
    if letter not in ("N", "K"):
        return None
    part = getattr(config, path.split(".")[0])
    return getattr(part, "kv_heads", part.heads)  # they divide the query heads


def shardings(
    config,
    table: Iterable[Rule],
    shapes: Mapping[str, Shape],
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.sharding.NamedSharding]:
    """Path -> sharding, see `specs`."""
    found = specs(config, table, shapes, mesh)
    return {path: jax.sharding.NamedSharding(mesh, spec) for path, spec in found.items()}
