"""The graph of a circuit: its nodes, and the strongest edges between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mllm_jax.analysis import attribution
from mllm_jax.analysis.edges import EdgeEffects, Node
from mllm_jax.typing import Bool


def part_name(unit: int, heads: int) -> str:
    """Return the name of a node of a layer: a head by its number, or the MLP after them."""
    return f"head {unit}" if unit < heads else "mlp"


def owners(node: Node, heads: int, kv_heads: int) -> list[tuple[int, str]]:
    """Return the (layer, part) that a sender or receiver belongs to.

    Keys and values belong to all heads that share them.
    """
    if node.part in ("embed", "mlp", "output"):
        return [(node.layer, node.part)]
    shared = heads // kv_heads if node.part in ("k", "v") else 1
    units = range(node.unit * shared, (node.unit + 1) * shared)
    return [(node.layer, part_name(unit, heads)) for unit in units]


def describe(node: Node) -> str:
    """Return the name of a sender or receiver, such as "4 q 2"."""
    if node.part in ("embed", "output"):
        return node.part
    return f"{node.layer} mlp" if node.part == "mlp" else f"{node.layer} {node.part} {node.unit}"


def edge_row(sender: Node, receiver: Node, score: float) -> dict[str, Any]:
    """Return an edge as JSON values."""
    return {
        "sender": describe(sender), "receiver": describe(receiver), "score": score,
        "from_layer": sender.layer, "to_layer": receiver.layer,
    }  # fmt: skip


def within(
    effects: EdgeEffects, circuit: Bool[np.ndarray, "L nodes"], count: int, kv_heads: int
) -> list[dict[str, Any]]:
    """Return the strongest edges among the embedding, the nodes of a circuit and the output.

    Args:
      effects: The effects of all edges, of one row.
      circuit: The heads of each layer and its MLP.
      count: The largest number of edges.
      kv_heads: The number of key-value heads of a layer.

    Returns:
      Rows as of `edge_row`, with the ends "from" and "to" as (layer, part); an edge into keys or
      values that several heads of the circuit share has an entry for each.
    """
    layers, nodes = circuit.shape
    heads = nodes - 1
    inside = {(int(i), part_name(int(n), heads)) for i, n in np.argwhere(circuit)}
    inside |= {(-1, "embed"), (layers, "output")}
    ends = [
        [[owner for owner in owners(node, heads, kv_heads) if owner in inside] for node in side]
        for side in (effects.senders, effects.receivers)
    ]
    is_inside = np.array([bool(s) for s in ends[0]])[:, None] & [bool(r) for r in ends[1]]
    is_inside &= effects.is_edge
    values = np.where(is_inside, effects.values[0], 0)
    places = attribution.top(np.abs(values), min(count, int(is_inside.sum())))
    return [
        edge_row(effects.senders[u], effects.receivers[v], float(values[u, v]))
        | {"from": list(sender), "to": list(receiver)}
        for u, v in places
        for sender in ends[0][u]
        for receiver in ends[1][v]
    ]
