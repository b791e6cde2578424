"""Figures of plans: what lies in a chip's memory, and what a run takes at least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mllm_jax.report import figures

GIB = 2**30
PARTS = ("weights", "optimiser", "states", "activations", "results", "edits", "batch", "code")
LIMITS = {"compute": "#0072B2", "memory": "#D55E00", "links": "#009E73"}


@figures.styled
def plans(name: str, found: Sequence[Any]) -> Figure:
    """A row for each plan: bytes of a chip by what lies there, and lower bounds of its time.

    Args:
        name: of the model.
        found: of `sharding.plan`.
    """
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(found)))
    memory, time = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    hue = figures.palette((*PARTS, "other"))
    for row, plan in enumerate(found):
        left = 0.0
        for part in (*PARTS, "other"):
            width = sum(
                n for key, n in plan.bytes.items()
                if key == part or (part == "other" and key not in PARTS)
            ) / GIB  # fmt: skip
            memory.barh(row, width, left=left, color=hue[part], height=0.62)
            if width > 0.04 * (plan.capacity or 1) / GIB and width > 0.06 * left:
                memory.text(
                    left + width / 2, row, part, ha="center", va="center", color="white",
                    fontsize=7, clip_on=True,
                )  # fmt: skip
            left += width
        if plan.capacity:
            memory.plot([plan.capacity / GIB] * 2, [row - 0.42, row + 0.42], color=figures.INK)
        verdict = {True: "", False: "  does not fit", None: "  without activations"}[plan.fits]
        memory.text(left, row, f" {left:.1f}{verdict}", va="center", fontsize=8)
        for limit, seconds in plan.seconds.items():
            if seconds:
                time.scatter(seconds * 1e3, row, color=LIMITS[limit], s=26, zorder=3)
    labels = [f"{p.study}\n{p.topology}, {p.mesh}" for p in found]
    memory.set_yticks(range(len(found)), labels)
    memory.set_ylim(len(found) - 0.5, -0.5)
    memory.set_title(f"{name}: memory of a chip")
    memory.set_xlabel("GiB; the line is what the chip has")
    time.set_title("a run takes at least")
    time.set_xlabel("ms")
    time.set_xscale("log")
    time.grid(axis="x")
    time.tick_params(left=False)
    for at, (limit, color) in enumerate(LIMITS.items()):
        time.text(0.02 + 0.22 * at, 1.005, limit, color=color, transform=time.transAxes, fontsize=8)
    return figure


@figures.styled
def scaling(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """Curves over the number of chips, a panel for each quantity.

    Args:
        curves: {panel title: {name of a curve: (chips, value) points}}.
    """
    figure = Figure(figsize=(3.6 * len(curves), 3.2))
    for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                    curves.items(), strict=True):  # fmt: skip
        hue = figures.palette(list(lines))
        for name, points in lines.items():
            chips, values = zip(*points, strict=True)
            axes.plot(chips, values, marker="o", markersize=3, color=hue[name])
            axes.annotate(
                name, (chips[-1], values[-1]), xytext=(4, 0), textcoords="offset points",
                color=hue[name], fontsize=7.5, va="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("chips")
        axes.grid(axis="y")
    return figure
