"""The figures of the circuit study: curves, nodes, exact patches, and the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import charts, page, style
from mllm_jax.typing import Float

Row = Mapping[str, Any]
Point = tuple[float, float]
CURVES = {"faithfulness": "share kept by the circuit", "left": "share left without it"}
PLUS, MINUS = style.PALETTE[0], style.PALETTE[1]  # colours of edges that raise and lower the metric


def colour(circuit: str) -> str:
    """Return the colour of a circuit: random ones are grey."""
    return style.PALETTE[0] if circuit == "found" else style.GREY


@style.styled
def curves(rows: Sequence[Row]) -> Figure:
    """Draw the shares by the number of nodes, of the circuit found and of random ones.

    Args:
      rows: The rows "curves" of results.json.
    """
    figure = Figure(figsize=(8, 3))
    for ax, (name, title) in zip(figure.subplots(1, 2, sharey=True), CURVES.items(), strict=True):
        for circuit in dict.fromkeys(row["circuit"] for row in rows):
            line = [row for row in rows if row["circuit"] == circuit]
            keys = ("nodes", name, f"{name}_low", f"{name}_high")
            at, value, low, high = (np.array([row[key] for row in line]) for key in keys)
            ax.plot(at, value, "o-", markersize=3.5, color=colour(circuit))
            ax.fill_between(at, low, high, color=colour(circuit), alpha=0.15, linewidth=0)
        for level in (0, 1):
            ax.axhline(level, color=style.INK, linewidth=0.6, linestyle=":")
        ax.set(title=title, xlabel="nodes of the circuit", xscale="log")
        ax.set_xticks(sizes := sorted({row["nodes"] for row in rows}), map(str, sizes))
        ax.minorticks_off()
        ax.grid(axis="y")
    return figure


def curve_panels(rows: Sequence[Row]) -> list[charts.Panel]:
    """Return the same chart to hover over and to zoom."""
    hue = {row["circuit"]: colour(row["circuit"]) for row in rows}
    return [
        charts.curves(
            title,
            charts.curves_of(
                rows, "circuit",
                {"at": "nodes", "mean": name, "low": f"{name}_low", "high": f"{name}_high"},
            ),
            hue, "nodes of the circuit", "share",
        )
        for name, title in CURVES.items()
    ]  # fmt: skip


@style.styled
def minimality(rows: Sequence[Row]) -> Figure:
    """Draw the share that is lost without each node, largest first.

    Args:
      rows: The rows "minimality" of results.json.
    """
    figure = Figure(figsize=(6, 3))
    ax = figure.subplots()
    for circuit in dict.fromkeys(row["circuit"] for row in rows):
        line = sorted((r for r in rows if r["circuit"] == circuit), key=lambda r: -r["value"])
        value, low, high = (np.array([r[key] for r in line]) for key in ("value", "low", "high"))
        at = np.arange(1, len(line) + 1)
        ax.errorbar(
            at, value, [value - low, high - value], fmt="o", markersize=3.5, linewidth=1,
            color=colour(circuit),
        )  # fmt: skip
    ax.axhline(0, color=style.INK, linewidth=0.6)
    ax.set(xlabel="nodes, largest loss first", ylabel="share lost without the node")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))
    ax.grid(axis="y")
    return figure


@style.styled
def exact(rows: Sequence[Row]) -> Figure:
    """Draw exact patches by their estimates, a colour for each kind of token.

    Args:
      rows: The rows "exact" of results.json.
    """
    figure = Figure(figsize=(4.2, 3.4))
    ax = figure.subplots()
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for kind, hue in style.palette(kinds).items():
        of_kind = [row for row in rows if row["kind"] == kind]
        x, y = ([row[key] for row in of_kind] for key in ("estimate", "exact"))
        ax.plot(x, y, "o", markersize=4, color=hue, label=f"at {kind} tokens", alpha=0.8)
    ax.axline((0, 0), slope=1, color=style.INK, linewidth=0.6, linestyle=":")
    ax.set(xlabel="estimate, nats", ylabel="exact patch, nats")
    ax.legend(frameon=False, fontsize=8)
    ax.grid()
    return figure


def exact_panel(rows: Sequence[Row]) -> charts.Panel:
    """Return the same chart to hover over and to zoom."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    values: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in kinds}
    for row in rows:
        for numbers, key in zip(values[row["kind"]], ("estimate", "exact"), strict=True):
            numbers.append(row[key])
    return charts.points(
        "Exact patches by their estimates", values, style.palette(kinds), "estimate, nats",
        "exact patch, nats",
    )  # fmt: skip


def positions(results: Row) -> dict[tuple[int, str], Point]:
    """Return the positions of the nodes of the graph: heads side by side, layers upward.

    Args:
      results: The content of results.json.

    Returns:
      (x, y) by (layer, part). The embedding and the output are included if an edge leads to them.
    """
    heads, found = results["heads"], {(row["layer"], row["part"]) for row in results["nodes"]}
    found |= {tuple(edge[end]) for edge in results["graph"] for end in ("from", "to")}

    def place(layer: int, part: str) -> Point:
        if part.startswith("head"):
            return float(part.split()[1]), float(layer)
        return {"mlp": (heads + 0.5, layer + 0.4)}.get(part, ((heads - 1) / 2, float(layer)))

    return {node: place(*node) for node in sorted(found)}


def bend(start: Point, end: Point) -> Float[np.ndarray, "2 points"]:
    """Return x and y along an edge, bent to the right so that edges of one column stay apart."""
    share = np.linspace(0, 1, 13)
    line = np.outer(start, 1 - share) + np.outer(end, share)
    line[0] += 0.12 * abs(end[1] - start[1]) * share * (1 - share)
    return line


def strengths(edges: Sequence[Row]) -> list[float]:
    """Return the size of each edge, as a share of the largest."""
    sizes = [abs(edge["score"]) for edge in edges]
    largest = max(sizes, default=0) or 1
    return [size / largest for size in sizes]


def node_colours(results: Row) -> dict[tuple[int, str], str]:
    """Return the colour of each node: of the kind of token at which its score is largest."""
    hue = dict(zip(results["kinds"], style.PALETTE[2:], strict=False))
    by_size = sorted(results["nodes"], key=lambda row: abs(row["score"]))
    return {(row["layer"], row["part"]): hue.get(row["kind"], style.GREY) for row in by_size}


@style.styled
def graph(results: Row) -> Figure:
    """Draw the nodes of the circuit and the strongest edges between them.

    Args:
      results: The content of results.json.
    """
    at, hue, edges = positions(results), node_colours(results), results["graph"]
    figure = Figure(figsize=(7, min(9, 2.5 + 0.22 * results["layers"])))
    ax = figure.subplots()
    for edge, strength in sorted(zip(edges, strengths(edges), strict=True), key=lambda e: e[1]):
        x, y = bend(at[tuple(edge["from"])], at[tuple(edge["to"])])
        line = PLUS if edge["score"] > 0 else MINUS
        ax.plot(x, y, color=line, linewidth=0.4 + 2.2 * strength, alpha=0.25 + 0.6 * strength,
                zorder=1)  # fmt: skip
    for node, (x, y) in at.items():
        label = node[1].removeprefix("head ")
        ax.text(
            x, y, label, ha="center", va="center", fontsize=7.5, color="white", zorder=2,
            bbox={"boxstyle": "round,pad=0.3", "facecolor": hue.get(node, style.INK),
                  "edgecolor": "white", "linewidth": 0.8},
        )  # fmt: skip
    for kind, shade in zip(results["kinds"], style.PALETTE[2:], strict=False):
        ax.plot([], [], "s", color=shade, label=f"at {kind} tokens")
    for label, line in (("raises the metric", PLUS), ("lowers it", MINUS)):
        ax.plot([], [], color=line, label=label)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlim=(-1, results["heads"] + 1.5), ylim=(-1.8, results["layers"] + 0.8), ylabel="layer")
    ax.set_xticks([*range(results["heads"]), results["heads"] + 0.5],
                  [*map(str, range(results["heads"])), "MLP"])  # fmt: skip
    ax.set_xlabel("head")
    ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(10, integer=True))
    return figure


def graph_panel(results: Row) -> charts.Panel:
    """Return the same chart to hover over and to zoom."""
    at, hue, edges = positions(results), node_colours(results), results["graph"]
    traces: list[charts.Trace] = []
    for edge, strength in sorted(zip(edges, strengths(edges), strict=True), key=lambda e: e[1]):
        x, y = bend(at[tuple(edge["from"])], at[tuple(edge["to"])])
        text = f"{edge['sender']} to {edge['receiver']}: {page.signed(edge['score'])}"
        traces.append(
            {"type": "scatter", "mode": "lines", "x": x, "y": y, "opacity": 0.25 + 0.6 * strength,
             "line": {"color": PLUS if edge["score"] > 0 else MINUS, "width": 0.5 + 3.5 * strength},
             "hoverinfo": "text", "text": charts.label(text), "showlegend": False}
        )  # fmt: skip
    traces.append(
        {"type": "scatter", "mode": "markers+text", "x": [x for x, _ in at.values()],
         "y": [y for _, y in at.values()], "showlegend": False, "hoverinfo": "text",
         "marker": {"size": 18, "color": [hue.get(node, style.INK) for node in at]},
         "text": [charts.label(part.removeprefix("head ")) for _, part in at],
         "textfont": {"color": "white", "size": 9},
         "hovertext": [_hover(node, results["nodes"]) for node in at]}
    )  # fmt: skip
    layout = {"xaxis": {"zeroline": False}, "yaxis": {"zeroline": False}, "height": 640}
    return charts.Panel("The circuit", traces, "head", "layer", layout)


def _hover(node: tuple[int, str], rows: Sequence[Row]) -> str:
    scores = [
        f"{page.signed(row['score'])} at {row['kind']} tokens"
        for row in rows
        if (row["layer"], row["part"]) == node
    ]
    name = node[1] if node[1] in ("embed", "output") else f"layer {node[0]}, {node[1]}"
    return charts.label(": ".join([name, ", ".join(scores)]) if scores else name)
