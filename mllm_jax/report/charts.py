"""Charts to hover over and to zoom: panels in Plotly's JSON, beside the figures of a page.

Plotly's script lies beside the page. Its Python package is not needed to describe a chart: a trace
is a dictionary as in https://plotly.com/javascript/reference/.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors

from mllm_jax.report import markup

SCRIPT = "plotly.min.js"
SCALES = {  # told apart by the colour-blind
    "counts": [[0, "#ffffff"], [1, "#0072b2"]],
    "changes": [[0, "#b2182b"], [0.5, "#f7f7f7"], [1, "#2166ac"]],
}
Trace = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot of a chart.

    Attributes:
      title: The title of the panel.
      traces: The traces, in Plotly's format.
      x: The label of the horizontal axis.
      y: The label of the vertical axis.
      layout: Further settings of Plotly's layout.
    """

    title: str
    traces: Sequence[Trace]
    x: str = ""
    y: str = ""
    layout: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Return the panel as plain JSON values."""
        axis = {"x": {"title": {"text": label(self.x)}}, "y": {"title": {"text": label(self.y)}}}
        layout = {
            "title": {"text": label(self.title)},
            "xaxis": axis["x"] | dict(self.layout.get("xaxis", {})),
            "yaxis": axis["y"] | dict(self.layout.get("yaxis", {})),
            **{key: value for key, value in self.layout.items() if not key.endswith("axis")},
        }
        return {
            "name": markup.plain(self.title),
            "data": [_plain(dict(trace)) for trace in self.traces],
            "layout": _plain(layout),
        }


Chart = Sequence[Panel]


def script() -> bytes:
    """Return Plotly's script, from its Python package."""
    return (importlib.resources.files("plotly") / "package_data" / SCRIPT).read_bytes()


def label(text: str) -> str:
    """Return a text escaped so that Plotly finds neither tags nor formulas."""
    return markup.text(text).replace("$", "&#36;")


def curves(
    title: str, curves: Mapping[str, Mapping[str, Sequence[float]]], hue: Mapping[str, str],
    x: str, y: str,
) -> Panel:  # fmt: skip
    """Return means by layer with their intervals, a curve for each name.

    Args:
      title: The title of the panel.
      curves: {name: {"mean": float[L]}}, optionally with "low", "high" and the positions "at" of
        the points; 0, 1, ... by default.
      hue: The colour of each name.
      x: The label of the horizontal axis.
      y: The label of the vertical axis.
    """
    traces: list[Trace] = []
    for name, curve in curves.items():
        steps = list(curve.get("at", range(len(curve["mean"]))))
        shared = {"legendgroup": label(name), "type": "scatter"}
        if "low" in curve:
            traces.append(
                {"x": [*steps, *steps[::-1]], "y": [*curve["high"], *list(curve["low"])[::-1]],
                 "fill": "toself", "fillcolor": _rgba(hue[name], 0.16), "mode": "lines",
                 "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, **shared}
            )  # fmt: skip
        ends = (
            [f"[{low:.3g}, {high:.3g}]" for low, high in zip(curve["low"], curve["high"])]
            if "low" in curve else [""] * len(steps)
        )  # fmt: skip
        traces.append(
            {"x": steps, "y": list(curve["mean"]), "mode": "lines+markers", "name": label(name),
             "line": {"color": hue[name]}, "marker": {"size": 4}, "hoverinfo": "text",
             "text": [f"{label(name)}, {label(x)} {step}: {value:.3g} {end}"
                      for step, value, end in zip(steps, curve["mean"], ends)], **shared}
        )  # fmt: skip
    return Panel(title, traces, x, y)


def curves_of(
    rows: Sequence[Mapping[str, Any]], by: str, keys: Mapping[str, str]
) -> dict[str, dict[str, list[Any]]]:
    """Return rows of numbers as the curves that `curves` draws.

    Args:
      rows: The rows, in the order of the points of a curve.
      by: The field that names the curve of a row.
      keys: The field of each key of a curve, such as {"at": "layer", "mean": "accuracy"}.
    """
    return {
        name: {key: [row[of] for row in rows if row[by] == name] for key, of in keys.items()}
        for name in dict.fromkeys(row[by] for row in rows)
    }


def lines(
    title: str, x: Sequence[float], values: Mapping[str, Sequence[float]], hue: Mapping[str, str],
    x_label: str, y_label: str,
) -> Panel:  # fmt: skip
    """Return a line for each name over the same x."""
    traces = [
        {"type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y),
         "name": label(name), "line": {"color": hue[name]}}
        for name, y in values.items()
    ]  # fmt: skip
    return Panel(title, traces, x_label, y_label)


def bars(
    title: str, values: Mapping[str, Sequence[float]], hue: Mapping[str, str], x: str, y: str
) -> Panel:
    """Return bars by layer, those of all names stacked."""
    traces = [
        {"type": "bar", "x": list(range(len(heights))), "y": list(heights), "name": label(name),
         "marker": {"color": hue[name]}, "hoverinfo": "text",
         "hovertext": [f"{label(name)}, {label(x)} {i}: {height:,}"
                       for i, height in enumerate(heights)]}
        for name, heights in values.items()
    ]  # fmt: skip
    return Panel(title, traces, x, y, {"barmode": "stack"})


def points(
    title: str, values: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    hue: Mapping[str, str], x: str, y: str,
) -> Panel:  # fmt: skip
    """Return points in the plane, a colour for each name."""
    traces = [
        {"type": "scatter", "mode": "markers", "x": list(xs), "y": list(ys), "name": label(name),
         "marker": {"color": hue[name], "size": 8, "opacity": 0.7}}
        for name, (xs, ys) in values.items()
    ]  # fmt: skip
    return Panel(title, traces, x, y)


def intervals(
    title: str, values: Mapping[str, Mapping[str, Any]], hue: Mapping[str, str], x: str
) -> Panel:
    """Return a point with its interval for each name.

    Args:
      title: The title of the panel.
      values: {name: {"value", "low", "high", "text"}}; the text appears on hover.
      hue: The colour of each name.
      x: The label of the axis.
    """
    traces = [
        {"type": "scatter", "mode": "markers", "x": [of["value"]], "y": [label(name)],
         "marker": {"color": hue[name], "size": 10}, "hoverinfo": "text",
         "hovertext": [label(of["text"])], "showlegend": False,
         "error_x": {"type": "data", "symmetric": False, "array": [of["high"] - of["value"]],
                     "arrayminus": [of["value"] - of["low"]], "color": hue[name]}}
        for name, of in values.items()
    ]  # fmt: skip
    return Panel(title, traces, x, layout={"yaxis": {"autorange": "reversed"}})


def matrix(
    title: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *,
    bounds: tuple[float, float], colours: str, texts: Sequence[Sequence[str]],
    hovers: Sequence[Sequence[str]], opens: Sequence[Sequence[str]] | None = None,
    x: str = "", y: str = "",
) -> Panel:  # fmt: skip
    """Return a heat map with a text in each cell.

    Args:
      title: The title of the panel.
      values: float[rows, columns]; NaN leaves a cell empty.
      rows: The names of the rows.
      columns: The names of the columns.
      bounds: The values at the ends of the colour scale.
      colours: A name of SCALES.
      texts: [rows][columns], the text in each cell.
      hovers: [rows][columns], the text that appears on hover.
      opens: [rows][columns], the id of the element that a click on the cell opens.
      x: The label of the horizontal axis.
      y: The label of the vertical axis.
    """
    trace: dict[str, Any] = {
        "type": "heatmap", "z": np.asarray(values, float).tolist(),
        "x": list(range(len(columns))), "y": list(range(len(rows))),
        "zmin": bounds[0], "zmax": bounds[1], "colorscale": SCALES[colours],
        "text": [[label(cell) for cell in line] for line in texts], "texttemplate": "%{text}",
        "hovertext": [[label(cell) for cell in line] for line in hovers], "hoverinfo": "text",
        "xgap": 1, "ygap": 1,
    }  # fmt: skip
    if opens is not None:
        trace["customdata"] = [list(line) for line in opens]
    layout = {
        "xaxis": {"tickvals": list(range(len(columns))), "ticktext": list(map(label, columns))},
        "yaxis": {"tickvals": list(range(len(rows))), "ticktext": list(map(label, rows)),
                  "autorange": "reversed"},
    }  # fmt: skip
    return Panel(title, [trace], x, y, layout)


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (round(255 * part) for part in colors.to_rgb(colour))
    return f"rgba({red},{green},{blue},{alpha})"


def _plain(value: Any) -> Any:
    """Return JSON values, None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(of) for key, of in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(of) for of in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
