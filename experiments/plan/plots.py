"""Figures of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from mllm_jax.planning.plan import Plan
from mllm_jax.report import style

GIB = 2**30
PARTS = ("weights", "optimiser", "states", "activations", "results", "other")
LIMITS = {"compute": "#0072B2", "memory": "#D55E00", "links": "#009E73"}


@style.styled
def plans(name: str, plans: Sequence[Plan]) -> Figure:
    """Draw the memory of a chip by its content, and lower bounds of time, one row per plan.

    Args:
      name: The name of the model.
      plans: The plans.
    """
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(plans)))
    memory, time = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    hue = style.palette(PARTS)
    for row, plan in enumerate(plans):
        capacity, left = plan.capacity or plan.total, 0.0
        for part, count in _parts(plan.bytes).items():
            width = 100 * count / capacity
            memory.barh(row, width, left=left, color=hue[part], height=0.62)
            if width > 9:
                memory.text(
                    left + width / 2, row, part, ha="center", va="center", color="white", fontsize=7
                )
            left += width
        verdict = {True: "", False: ", does not fit", None: ", without activations"}[plan.fits]
        memory.text(
            left, row, f" {plan.total / GIB:.2f} of {capacity / GIB:.0f} GiB{verdict}", va="center",
            fontsize=8,
        )  # fmt: skip
        for limit, seconds in plan.seconds.items():
            time.scatter(seconds * 1e3, row, color=LIMITS[limit], s=26, zorder=3)
    memory.set_yticks(range(len(plans)), [f"{p.study}\n{p.topology}, {p.mesh}" for p in plans])
    memory.set_ylim(len(plans) - 0.5, -0.5)
    memory.set_xlim(0, max(100, memory.get_xlim()[1]))
    memory.set_title(f"{name}: memory of a chip")
    memory.set_xlabel("%")
    time.set_title("lower bound of the time of a run")
    time.set_xlabel("ms")
    time.set_xscale("log")
    time.xaxis.set_major_formatter("{x:g}")
    time.grid(axis="x")
    time.tick_params(left=False)
    for position, (limit, color) in zip((0.6, 0.8, 0.98), LIMITS.items(), strict=True):
        time.text(
            position, 1.01, limit, color=color, ha="right", transform=time.transAxes, fontsize=8
        )
    return figure


def _parts(held: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of each of PARTS."""
    by_part = dict.fromkeys(PARTS, 0)
    for name, count in held.items():
        by_part[name if name in by_part else "other"] += count
    return by_part


@style.styled
def scaling(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """Draw quantities by the number of chips, one panel per quantity.

    Args:
      curves: {title: {name of a curve: (chips, value) points}}.
    """
    figure = Figure(figsize=(3.6 * len(curves), 3.2))
    for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0],
                                    curves.items(), strict=True):  # fmt: skip
        hue = style.palette(list(lines))
        for name, points in lines.items():
            chips, values = zip(*points, strict=True)
            axes.plot(chips, values, marker="o", markersize=3, color=hue[name])
            axes.annotate(
                name, (chips[-1], values[-1]), xytext=(4, 0), textcoords="offset points",
                color=hue[name], fontsize=7.5, va="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(title)
        axes.set_xlabel("chips")
        axes.grid(axis="y")
    return figure
