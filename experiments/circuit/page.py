"""The report of the circuit study: figures, tables and a page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.circuit import figures
from mllm_jax.report import page, parts

SWAPS = {
    "picture": "the same question about two pictures",
    "question": "two questions about the same picture",
}


def write(workdir: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write the figures, the tables and index.html.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
    """
    folder = pathlib.Path(workdir)
    kept = {split: counts["kept"] for split, counts in results["pairs"].items()}
    content = page.Page(
        title="The circuit of an answer",
        lead=f"Which heads and MLPs of {page.model_name(results)} carry the difference between "
        f"{SWAPS[results['swap']]}? The metric is the difference of the log-probabilities of the "
        "two answers at the first token in which they differ.",
        facts=[
            (f"{kept['train']}", "training pairs"),
            (f"{kept['test']}", "held-out pairs"),
            (f"{len(results['nodes'])}", "nodes of the circuit that is shown"),
        ],
        sections=[
            _curves(folder, results),
            _graph(folder, results),
            _minimality(folder, results),
            *([_exact(folder, results)] if results["exact"]["nodes"] else []),
        ],
        data=(page.RECORDS[0], ("circuit.npz", "circuit.npz"), *page.RECORDS[1:]),
    )
    page.write(folder / "index.html", content)


def interval(row: Mapping[str, Any], name: str = "value", prefix: str = "") -> str:
    """Return a value with its interval."""
    low, high = (page.signed(row[f"{prefix}{end}"]) for end in ("low", "high"))
    return f"{page.signed(row[name])} [{low}, {high}]"


def _curves(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section:
    rows = results["curves"]
    figure = parts.write_figure(
        folder, "curves", figures.curves(rows),
        "What circuits keep of the difference, and what is left without them",
        chart=figures.curve_panels(rows),
    )  # fmt: skip
    columns = tuple(rows[0])
    data = parts.write_csv(folder, "curves", columns, [[row[c] for c in columns] for row in rows])
    most = max(row["nodes"] for row in rows)
    last = [row for row in rows if row["nodes"] == most]
    random = [row["faithfulness"] for row in last if row["circuit"] != "found"]
    beside = f"; random ones keep {page.signed(sum(random) / len(random))}" if random else ""
    ends, counts = results["difference"], results["pairs"]["test"]
    return page.Section(
        title="Faithful and complete",
        reading=f"With all but {most} nodes corrupt, the circuit keeps "
        f"{interval(last[0], 'faithfulness', 'faithfulness_')} of the difference on held-out "
        f"pairs{beside}. With only these nodes corrupt, {interval(last[0], 'left', 'left_')} is "
        "left.",
        figures=[figure],
        table=page.Table(
            ("circuit", "nodes", "kept by the circuit", "left without it"),
            [(row["circuit"], f"{row['nodes']}", interval(row, "faithfulness", "faithfulness_"),
              interval(row, "left", "left_")) for row in rows],
        ),
        note=f"The metric is {interval(ends['clean'])} nats on clean inputs and "
        f"{interval(ends['corrupt'])} on corrupt ones; {counts['kept']} of {counts['candidates']} "
        "candidate pairs are kept. Grey: random circuits of equal size. Intervals: 95 % bootstrap "
        "over pairs.",
        data=[data],
    )  # fmt: skip


def _graph(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section:
    figure = parts.write_figure(
        folder, "graph", figures.graph(results),
        "The nodes of the circuit by layer, and the strongest edges between them",
        chart=[figures.graph_panel(results)],
    )  # fmt: skip
    nodes = parts.write_csv(
        folder, "nodes", ("kind", "layer", "part", "score"),
        [tuple(row[c] for c in ("kind", "layer", "part", "score")) for row in results["nodes"]],
    )  # fmt: skip
    ends = ("sender", "receiver", "score")
    edges = parts.write_csv(
        folder, "edges", ends, [tuple(row[c] for c in ends) for row in results["edges"]]
    )
    first = results["nodes"][0]
    return page.Section(
        title="The circuit",
        reading=f"The highest score is that of {first['part']} of layer {first['layer']} at "
        f"{first['kind']} tokens, {page.signed(first['score'])} nats.",
        figures=[figure],
        table=page.Table(
            ("edge from", "to", "score, nats"),
            [(row["sender"], row["receiver"], page.signed(row["score"]))
             for row in results["edges"][:15]],
        ),
        note="Nodes and edges are chosen by their scores, which are estimates on training pairs. "
        "The table has the strongest of all edges, inside the circuit or not. Evaluated circuits "
        "consist of nodes with all their edges. q, k, v: the queries, keys and values of a head.",
        data=[nodes, edges],
    )  # fmt: skip


def _minimality(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section:
    rows = results["minimality"]
    figure = parts.write_figure(
        folder,
        "minimality",
        figures.minimality(rows),
        "The share of the difference that is lost without each node of the circuit",
    )
    columns = tuple(rows[0])
    data = parts.write_csv(
        folder, "minimality", columns, [[row[c] for c in columns] for row in rows]
    )
    found = [row for row in rows if row["circuit"] == "found"]
    needed = sum(row["low"] > 0 for row in found)
    return page.Section(
        title="Minimal",
        reading=f"{needed} of the {len(found)} nodes are needed: without one of them the circuit "
        "loses a share whose interval is above 0.",
        figures=[figure],
        note="Colour: the nodes of the circuit that is shown; grey: those of a random circuit of "
        "equal size. Intervals: 95 % bootstrap over pairs, not corrected for their number.",
        data=[data],
    )


def _exact(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section:
    exact = results["exact"]
    rows, correlation = exact["nodes"], exact["correlation"]
    figure = parts.write_figure(
        folder, "exact", figures.exact(rows), "Exact patches by their estimates",
        chart=[figures.exact_panel(rows)],
    )  # fmt: skip
    columns = ("kind", "layer", "part", "estimate", "exact")
    data = parts.write_csv(folder, "exact", columns, [[row[c] for c in columns] for row in rows])
    return page.Section(
        title="Estimates and exact patches",
        reading=f"Over {len(rows)} nodes, estimate and exact patch have a correlation of "
        f"{interval(correlation['pearson'])}, of ranks {interval(correlation['spearman'])}.",
        figures=[figure],
        note=f"Half of the nodes have the largest absolute scores, the others are drawn at random; "
        f"means over {exact['pairs']} training pairs. Intervals: 95 % bootstrap over nodes.",
        data=[data],
    )
