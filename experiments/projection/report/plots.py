"""Figures of the projection study."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm_jax.report import figures, style


@style.styled
def forest(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    hue: Mapping[str, str],
    label: str,
    *,
    against: str | None = None,
    format_value: Callable[[float], str] = "{:.2f}".format,
) -> Figure:
    """Draw values with intervals: one row of panels per group, one panel per task.

    Args:
      panels: {group: {task: {name: {"mean", "low", "high"}}}}; a group may lack names and tasks.
      hue: {name: colour}, in the order of the lines.
      label: The label of the axis.
      against: The name whose value is drawn as a reference line; "0" draws it at zero.
      format_value: Returns the text of a value.
    """
    tasks = list(dict.fromkeys(task for by_task in panels.values() for task in by_task))
    names = {
        group: [name for name in hue if any(name in lines for lines in by_task.values())]
        for group, by_task in panels.items()
    }
    heights = [0.27 * len(lines) + 0.28 for lines in names.values()]
    figure = Figure(figsize=(11, sum(heights) + 0.35 * len(panels) + 0.45))
    grid = figure.subplots(
        len(panels), len(tasks), squeeze=False, sharex=True, height_ratios=heights
    )
    for row, (group, by_task) in enumerate(panels.items()):
        for ax, task in zip(grid[row], tasks, strict=True):
            lines = by_task.get(task, {})
            reference = 0.0 if against == "0" else lines.get(against or "", {}).get("mean")
            if reference is not None:
                ax.axvline(
                    reference, color=style.GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0
                )
            for y, name in enumerate(names[group]):
                if name in lines:
                    _forest_line(ax, y, lines[name], hue[name], format_value)
            ax.set(ylim=(len(names[group]) - 0.4, -0.6), yticks=range(len(names[group])))
            first = ax is grid[row, 0]
            ax.set_yticklabels(names[group] if first else [])
            ax.tick_params(axis="y", length=0, labelcolor=style.INK, labelsize=8.5)
            ax.tick_params(labelbottom=row == len(panels) - 1)
            ax.grid(axis="x")
            ax.spines["left"].set_visible(False)
            if row == 0:
                ax.set_title(task)
        if group:
            grid[row, 0].annotate(
                group, (0, 1), (-6, 2), xycoords="axes fraction", textcoords="offset points",
                ha="right", va="bottom", color=style.GREY, fontsize=8.5, style="italic",
            )  # fmt: skip
    for ax in grid[-1]:
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.set_xlabel(label)
    return figure


def _forest_line(
    ax: Axes,
    y: float,
    value: Mapping[str, float],
    colour: str,
    format_value: Callable[[float], str],
) -> None:
    ax.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=4, alpha=0.3)
    ax.plot([value["mean"]], [y], "o", markersize=6, color=colour, markeredgewidth=0)
    ax.text(
        1.02, y, format_value(value["mean"]).replace("-", "\N{MINUS SIGN}"), va="center",
        transform=ax.get_yaxis_transform(), color=style.darken(colour), fontsize=8,
        fontweight="bold",
    )  # fmt: skip


@style.styled
def slopes(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], label: str
) -> Figure:
    """Draw values by stage: one line per task, one panel per measure.

    Args:
      panels: {title: {task: {stage: {"mean", "low", "high"}}}}, stages in order.
      label: The label of the values.
    """
    tasks = list(dict.fromkeys(task for by_task in panels.values() for task in by_task))
    hue = style.palette(tasks)
    stages = {
        title: list(dict.fromkeys(stage for points in by_task.values() for stage in points))
        for title, by_task in panels.items()
    }
    figure = Figure(figsize=(11, 3.9))
    axes = figure.subplots(
        1, len(panels), squeeze=False, sharey=True, width_ratios=[len(s) for s in stages.values()]
    )[0]
    for ax, (title, by_task) in zip(axes, panels.items(), strict=True):
        positions = {stage: position for position, stage in enumerate(stages[title])}
        for number, (task, points) in enumerate(by_task.items()):
            shift = 0.035 * (number - (len(by_task) - 1) / 2)  # separates the intervals of tasks
            x = [positions[stage] + shift for stage in points]
            mean, low, high = (
                [point[key] for point in points.values()] for key in ("mean", "low", "high")
            )
            ax.vlines(x, low, high, color=hue[task], linewidth=3.5, alpha=0.25)
            ax.plot(x, mean, "o-", color=hue[task], linewidth=1.6, markersize=5.5)
        ax.set(xlim=(-0.3, len(positions) - 0.7), xticks=range(len(positions)))
        ax.set_xticklabels(list(positions))
        ax.tick_params(axis="x", length=0, labelsize=9, labelcolor=style.INK)
        ax.grid(axis="y")
        ax.set_title(title)
    axes[0].set_ylabel(label)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(0, low), min(1.02, high))
    for ax, by_task in zip(axes, panels.values(), strict=True):
        ends = {task: {"mean": [p["mean"] for p in points.values()]}
                for task, points in by_task.items()}  # fmt: skip
        figures.label_ends(ax, ends, hue)
    return figure


@style.styled
def depth(
    curves: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]],
    hue: Mapping[str, str],
    levels: Mapping[str, float],
    label: str,
) -> Figure:
    """Draw the scores of probes by layer: one row of panels per kind of token.

    Args:
      curves: {kind: {task: {variant: {"mean", "low", "high": float[L]}}}}.
      hue: {variant: colour}.
      levels: {task: the value before the projection}, drawn as reference lines.
      label: The label of the values.
    """
    tasks = list(dict.fromkeys(task for by_task in curves.values() for task in by_task))
    figure = Figure(figsize=(11, 2.35 * len(curves) + 0.35))
    grid = figure.subplots(len(curves), len(tasks), squeeze=False, sharex=True, sharey=True)
    for row, (kind, by_task) in enumerate(curves.items()):
        for ax, task in zip(grid[row], tasks, strict=True):
            figures.draw_curves(ax, by_task[task], hue)
            if task in levels:
                ax.axhline(levels[task], color=style.GREY, linewidth=0.9, linestyle=(0, (2, 2)))
                ax.text(
                    0.99, levels[task], "before the projection", ha="right", va="bottom",
                    transform=ax.get_yaxis_transform(), color=style.GREY, fontsize=7.5,
                    style="italic", path_effects=style.halo(),
                )  # fmt: skip
            if row == 0:
                ax.set_title(task)
        grid[row, 0].set_ylabel(f"{kind}\n{label}")
    for ax in grid[-1]:
        ax.set_xlabel("layer")
    for ax, by_task in zip(grid[:, -1], curves.values(), strict=True):
        figures.label_ends(ax, by_task[tasks[-1]], hue)
    return figure


@style.styled
def migration(
    neurons: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], hue: Mapping[str, str]
) -> Figure:
    """Draw the neurons that a domain kept, lost and gained: one panel per module.

    Args:
      neurons: {module: {task: {variant: {"before", "after", "kept", "jaccard"}}}}.
      hue: {variant: colour}.
    """
    tasks = list(next(iter(neurons.values())))
    variants = [name for name in hue if name in next(iter(next(iter(neurons.values())).values()))]
    figure = Figure(figsize=(11, 0.3 * len(tasks) * len(variants) + 1.2))
    axes = figure.subplots(1, len(neurons), squeeze=False)[0]
    step = 0.8 / len(variants)
    for ax, (module, by_task) in zip(axes, neurons.items(), strict=True):
        for i, task in enumerate(tasks):
            for j, variant in enumerate(variants):
                counts, y = by_task[task][variant], i + (j - (len(variants) - 1) / 2) * step
                kept = counts["kept"]
                lost, gained = counts["before"] - kept, counts["after"] - kept
                bar = functools.partial(ax.barh, y, height=0.8 * step)
                bar(lost, left=-lost, color=style.FAINT)
                bar(kept, color=hue[variant])
                bar(gained, left=kept, color=hue[variant], alpha=0.35)
                ax.text(
                    1.02, y, f"{counts['jaccard']:.2f}", transform=ax.get_yaxis_transform(),
                    va="center", fontsize=8, color=style.darken(hue[variant]),
                )  # fmt: skip
        ax.axvline(0, color=style.GREY, linewidth=0.6)
        ax.use_sticky_edges = False  # adds a margin around the bars
        ax.set(ylim=(len(tasks) - 0.5, -0.5), yticks=range(len(tasks)), xlabel="neurons")
        ax.set_yticklabels(tasks if ax is axes[0] else [])
        ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=style.INK)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        ax.set_title(module)
        ax.annotate(
            "Jaccard", (1.02, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
            color=style.GREY, fontsize=7.5,
        )  # fmt: skip
    patch = matplotlib.patches.Patch
    handles = [
        patch(color=style.FAINT, label="lost"),
        *(patch(color=hue[name], label=f"kept, {name}") for name in variants),
        *(patch(color=hue[name], alpha=0.35, label=f"gained, {name}") for name in variants),
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False,
        handlelength=1.1, handleheight=0.9, columnspacing=1.4, fontsize=8.5,
    )  # fmt: skip
    return figure
