"""Shard parameters by rules in axis letters.

A rule is a pattern of dotted paths and a PartitionSpec of axis letters (`typing.LETTERS`), where
`None` is an axis that is never sharded. `PARAMETER_MESH_AXES` maps letters to axes of the mesh:

* heads, neurons and vocabulary over `model`, as Megatron-LM does (Shoeybi et al. 2019): one
  reduction after attention, one after the MLP;
* the other axis of each matrix over `fsdp`: a device holds a share of every layer and gathers the
  layer in use (ZeRO 3, Rajbhandari et al. 2020).

Parameters are replicated over `data`. Layers are stacked on the axis L, which is never sharded: a
scan takes one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

Rule = tuple[str, P]
Shape = tuple[int, ...]

PARAMETER_MESH_AXES = dict.fromkeys("NKFV", "model") | dict.fromkeys("DEW", "fsdp")


def _attention(path: str, width: str, source: str, kv: str = "N") -> tuple[Rule, ...]:
    """Return the rules of an attention from a source to states of this width."""
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
    (r"vision\.layers\.attn\.[qk]_norm\.scale", P("L", None)),
    (r"vision\.layers\.scale[12]", P("L", None)),
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

DECODER = (
    (r"lm\.embed", P("V", "D")),
    (r"lm\.norm\.scale", P(None)),
    (r"lm\.head\.kernel", P("D", "V")),
    (r"lm\.layers\.(attn|mlp)_(post_)?norm\.scale", P("L", None)),
    (r"lm\.layers\.attn\.[qk]_norm\.scale", P("L", None)),
    *_attention(r"lm\.layers\.attn", "D", "D", kv="K"),
    *_mlp(r"lm\.layers\.mlp", "D"),
)


def projector(depth: int) -> tuple[Rule, ...]:
    """Return the rules of a projector of `depth` linear maps.

    The first of several maps is sharded by its neurons; a single or a later map is sharded by its
    inputs and summed.
    """
    around = (
        (r"projector\.norm\.(scale|bias)", P(None)),
        (r"projector\.merge\.kernel", P("E", None)),
    )
    if depth == 1:
        return (
            *around,
            (r"projector\.linears\.0\.kernel", P("F", "D")),
            (r"projector\.linears\.0\.bias", P(None)),
        )
    return (
        *around,
        (r"projector\.deepstack\.norm\.(scale|bias)", P("L", None)),
        (r"projector\.deepstack\.linears\.0\.kernel", P("L", "E", "F")),
        (r"projector\.deepstack\.linears\.0\.bias", P("L", "F")),
        (r"projector\.deepstack\.linears\.[1-9]\d*\.kernel", P("L", "F", "D")),
        (r"projector\.deepstack\.linears\.[1-9]\d*\.bias", P("L", None)),
        (r"projector\.linears\.0\.kernel", P("E", "F")),
        (r"projector\.linears\.0\.bias", P("F")),
        (r"projector\.linears\.[1-9]\d*\.kernel", P("F", "D")),
        (r"projector\.linears\.[1-9]\d*\.bias", P(None)),
    )


def match(paths: Iterable[str], table: Iterable[Rule]) -> dict[str, P]:
    """Return the PartitionSpec, in axis letters, of each parameter by path.

    Args:
      paths: The dotted paths of parameters.
      table: The rules of the architecture.

    Raises:
      ValueError: A parameter matches no rule, or several; the message lists all of them.
    """
    table = tuple(table)
    matches = {path: [rule for rule in table if re.fullmatch(rule[0], path)] for path in paths}
    none = [path for path, hits in matches.items() if not hits]
    several = [
        f"{path} ({' and '.join(pattern for pattern, _ in hits)})"
        for path, hits in matches.items()
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
    return {path: hits[0][1] for path, hits in matches.items()}


def specs(
    config,
    table: Iterable[Rule],
    shapes: Mapping[str, Shape],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> dict[str, P]:
    """Return the PartitionSpec on a mesh of each parameter by path.

    An axis that the mesh does not divide is not sharded. A single head is never divided.

    Args:
      config: The config of the model, for its numbers of heads.
      table: The rules of its architecture.
      shapes: The shape of each parameter by dotted path, L axis included.
      mesh: A mesh from `mesh.mesh`, or an abstract one.

    Raises:
      ValueError: A parameter matches no rule, or several.
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


def _axis(
    letter: str | None, count: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> str | None:
    axis = PARAMETER_MESH_AXES.get(letter or "")
    return axis if axis and mesh.shape[axis] > 1 and count % mesh.shape[axis] == 0 else None


def _count(config: Any, path: str, letter: str | None) -> int | None:
    """Return the number of heads of an axis of heads; None for other axes."""
    if letter not in ("N", "K"):
        return None
    part = getattr(config, path.split(".")[0])
    return getattr(part, "kv_heads", part.heads)  # key-value heads divide the query heads


def shardings(
    config,
    table: Iterable[Rule],
    shapes: Mapping[str, Shape],
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.sharding.NamedSharding]:
    """Return the sharding of each parameter by path, see `specs`."""
    return {
        path: jax.sharding.NamedSharding(mesh, spec)
        for path, spec in specs(config, table, shapes, mesh).items()
    }
