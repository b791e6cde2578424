"""Figures of the domain-neuron study."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from experiments.domain_neurons.report import panels, stage_plots
from mllm_jax.report import figures, style

# By module, kind of token, domain and measure.
Deviations = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]


@style.styled
def neurons_per_layer(
    counts: Mapping[str, Mapping[str, Sequence[int]]], subtitles: Mapping[str, str]
) -> Figure:
    """Draw the number of neurons by layer: one row per domain, one column per module.

    Args:
      counts: {module: {domain: int[L]}}.
      subtitles: The second line of each module's title.
    """
    domains = list(next(iter(counts.values())))
    hue = style.palette(domains)
    depth = {module: len(next(iter(by_domain.values()))) for module, by_domain in counts.items()}
    figure = Figure(figsize=(11, 1.0 + 0.95 * len(domains)))
    grid = figure.subplots(
        len(domains),
        len(counts),
        squeeze=False,
        width_ratios=[max(layers, 7) for layers in depth.values()],
    )
    for column, (module, by_domain) in enumerate(counts.items()):
        top = max(1, max(max(values) for values in by_domain.values()))
        for row, (domain, values) in enumerate(by_domain.items()):
            ax = grid[row, column]
            if depth[module] == 1:
                _one_layer(ax, values[0], top, hue[domain])
            else:
                _many_layers(ax, np.asarray(values), top, hue[domain])
            ax.tick_params(labelbottom=row == len(domains) - 1 and depth[module] > 1)
            if column == 0:
                ax.set_ylabel(
                    domain, rotation=0, ha="right", va="center", color=style.darken(hue[domain]),
                    fontweight="bold", fontsize=9.5, labelpad=12,
                )  # fmt: skip
        _heading(grid[0, column], module, subtitles[module])
        if depth[module] > 1:
            grid[-1, column].set_xlabel("layer")
    return figure


def _heading(ax: Axes, title: str, subtitle: str) -> None:
    write = functools.partial(
        ax.annotate, xy=(0, 1), xycoords="axes fraction", textcoords="offset points"
    )
    write(title, xytext=(0, 19), fontweight="bold", fontsize=style.STYLE["axes.titlesize"])
    write(subtitle, xytext=(0, 6), color=style.GREY, fontsize=8)


def _many_layers(ax: Axes, values: np.ndarray, top: int, colour: str) -> None:
    ax.bar(np.arange(len(values)), values, width=0.78, color=colour)
    ax.set(xlim=(-0.7, len(values) - 0.3), ylim=(0, top * 1.25), yticks=[0, _round_below(top)])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    ax.grid(axis="y")
    ax.text(
        0.998, 1.0, f"{values.sum():,}", transform=ax.transAxes, ha="right", va="top",
        color=style.darken(colour), path_effects=style.halo(), fontweight="bold",
    )  # fmt: skip


def _one_layer(ax: Axes, value: int, top: int, colour: str) -> None:
    ax.barh([0], [value], height=0.5, color=colour)
    ax.text(
        value + top * 0.05,
        0,
        f"{value:,}",
        va="center",
        color=style.darken(colour),
        fontweight="bold",
    )
    ax.set(xlim=(0, top * 1.45), ylim=(-0.8, 0.8), xticks=[], yticks=[])
    ax.spines["bottom"].set_visible(False)


@style.styled
def ablation_matrix(
    selected: Mapping[str, np.ndarray],
    controls: Mapping[str, Mapping[str, np.ndarray]],
    star: Mapping[str, np.ndarray],
    domains: Sequence[str],
    bound: float,
    questions: Mapping[str, int],
) -> Figure:
    """Draw the change of accuracy by the ablation of a domain's neurons, and of controls.

    Args:
      selected: {module: float[D_, D_]} by mask and data; NaN where not measured.
      controls: {title of its row: the same for a kind of control}; a module may be absent.
      star: {module: bool[D_, D_]}, where `selected` is beyond chance.
      domains: The names of rows and columns.
      bound: The change at the ends of the colour scale.
      questions: The number of questions on which each domain is tested.
    """
    columns = [f"{name} (n = {questions[name]:,})" if name in questions else name
               for name in domains]  # fmt: skip
    rows = [("domain neurons ablated", selected, star)]
    rows += [(title, values, {}) for title, values in controls.items()]
    cell = max(0.42 * len(domains), 1.7)  # at least the length of a title
    width = 2.3 + (cell + 0.35) * len(selected)
    figure = Figure(figsize=(width, (cell + 0.5) * len(rows) + 0.9))
    grid = figure.subplots(len(rows), len(selected), squeeze=False)
    for row, (title, values, marks) in enumerate(rows):
        for column, module in enumerate(selected):
            ax = grid[row, column]
            if module not in values:
                ax.set_axis_off()
                continue
            image = _matrix(ax, values[module], domains, bound, marks.get(module), columns)
            ax.tick_params(labelleft=column == 0, labelbottom=row == len(rows) - 1)
            if row == 0:
                ax.set_title(module)
        grid[row, 0].set_ylabel(title, color=style.INK, fontweight="bold")
    for ax in grid[-1]:
        ax.set_xlabel("tested on")
    bar = figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label("change of accuracy, points")
    is_starred = any(marks.any() for marks in star.values())
    beyond = "bold with *: beyond chance, corrected" if is_starred else "none is beyond chance"
    key = "framed: tested on its own domain", beyond
    figure.supxlabel((" · " if width > 6 else "\n").join(key), color=style.GREY, fontsize=8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: panels.points(value))
    return figure


def _matrix(
    ax: Axes,
    values: np.ndarray,
    domains: Sequence[str],
    bound: float,
    star: np.ndarray | None,
    columns: Sequence[str] = (),
) -> AxesImage:
    """Draw accuracy differences in points as a heat map, with a frame around the diagonal."""
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="#F2F2F2")
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-bound, vmax=bound)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        mark = "*" if star is not None and star[row, column] else ""
        ax.text(
            column, row, f"{panels.points(value)}{mark}", ha="center", va="center", fontsize=7.5,
            in_layout=False,
            color=style.text_colour_on(image.cmap(image.norm(value))),
            fontweight="bold" if mark else "normal",
        )  # fmt: skip
    for own in range(min(values.shape)):
        frame = matplotlib.patches.Rectangle(
            (own - 0.5, own - 0.5), 1, 1, fill=False, edgecolor=style.INK, linewidth=1.1
        )
        ax.add_patch(frame)
    figures.name_cells(ax, domains, columns)
    return image


@style.styled
def deviation(
    selected: Deviations, control: Deviations, measures: Mapping[str, str], control_label: str
) -> Figure:
    """Draw the deviation of hidden states: dots for a domain's neurons, rings for controls.

    Args:
      selected: {module: {kind: {domain: {measure: value}}}}.
      control: The same for a control; entries may be absent.
      measures: The axis label of each measure, which has a row of panels.
      control_label: The name of the control in the legend.
    """
    first = next(iter(selected.values()))
    kinds, domains = list(first), list(next(iter(first.values())))
    hue = style.palette(domains)
    height = 0.16 * len(domains) * len(kinds) + 0.75
    figure = Figure(figsize=(11, height * len(measures) + 0.4))
    grid = figure.subplots(len(measures), len(selected), squeeze=False, sharey=True, sharex="row")
    step = 0.8 / len(domains)

    for row, (measure, label) in enumerate(measures.items()):
        values = np.array([v for source in (selected, control) for v in _values(source, measure)])
        # A logarithmic scale has no zero: the deviation of an empty mask is drawn at the edge.
        floor = values[values > 0].min(initial=1) / 2
        for column, module in enumerate(selected):
            ax = grid[row, column]
            for i, kind in enumerate(kinds):
                for j, domain in enumerate(domains):
                    y = i + (j - (len(domains) - 1) / 2) * step
                    own, other = (
                        source.get(module, {}).get(kind, {}).get(domain, {}).get(measure)
                        for source in (selected, control)
                    )
                    _dumbbell(ax, y, own, other, hue[domain], floor)
            ax.set_xlabel(label)
            _set_deviation_axes(ax, kinds, values, floor)
            if row == 0:
                ax.set_title(module)
    _key(figure, hue, control_label if control else None)
    return figure


@style.styled
def curves_by_domain(
    curves: Mapping[str, Mapping[str, Mapping[str, Any]]], hue: Mapping[str, str], label: str
) -> Figure:
    """Draw curves by layer, a panel for each domain, with intervals where they are known.

    Args:
      curves: {domain: {name: {"at": int[n], "mean": float[n]}}}, or also "low" and "high".
      hue: The colour of each name.
      label: The label of the vertical axis.
    """
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(11, 2.7 * lines + 0.5))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, (domain, by_name) in zip(grid, curves.items(), strict=False):
        figures.draw_curves(ax, by_name, hue)
        ax.set_title(domain)
        ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    for ax in grid[len(curves) :]:
        ax.set_axis_off()
    for line in range(lines):
        grid[line * columns].set_ylabel(label)
    names = dict.fromkeys(name for by_name in curves.values() for name in by_name)
    handles = [Line2D([], [], color=hue[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    return figure


def _values(deviations: Deviations, measure: str) -> list[float]:
    """Return the values of a measure in all modules, kinds and domains."""
    return [
        measured[measure]
        for by_kind in deviations.values()
        for by_domain in by_kind.values()
        for measured in by_domain.values()
        if measure in measured
    ]


def _set_deviation_axes(ax: Axes, kinds: Sequence[str], values: np.ndarray, floor: float) -> None:
    """Set a row for each kind of token, and a logarithmic axis on which `floor` stands for 0."""
    ax.set(yticks=range(len(kinds)), ylim=(len(kinds) - 0.45, -0.55))
    ax.set_yticklabels(kinds)
    ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=style.INK)
    ax.set(xscale="log", xlim=(floor * 0.9, max(values.max(initial=1e-9), floor) * 1.3))
    ticks = _log_ticks(1.5 * floor, ax.get_xlim()[1])
    zero = [floor] if (values <= 0).any() else []
    ax.set_xticks([*zero, *ticks], [*("0" for _ in zero), *(f"{tick:g}" for tick in ticks)])
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.grid(axis="x")
    for line in np.arange(0.5, len(kinds) - 1):
        ax.axhline(line, color=style.FAINT, linewidth=0.6)
    ax.spines["left"].set_visible(False)


def _dumbbell(
    ax: Axes, y: float, own: float | None, other: float | None, colour: str, floor: float
) -> None:
    """Draw the values of a domain's own neurons and of a control on one line."""
    own, other = (None if value is None else max(value, floor) for value in (own, other))
    if own is not None and other is not None:
        ax.plot([other, own], [y, y], color=colour, linewidth=1.2, alpha=0.45)
    if other is not None:
        ax.plot(
            [other], [y], "o", markersize=4.5, markerfacecolor="white", markeredgecolor=colour,
            markeredgewidth=1.1, clip_on=False,
        )  # fmt: skip
    if own is not None:
        ax.plot([own], [y], "o", markersize=5, color=colour, markeredgewidth=0, clip_on=False)


def _key(figure: Figure, hue: Mapping[str, str], rings: str | None) -> None:
    """Draw the legend of the colours and of the two marks above the panels."""
    dot = functools.partial(matplotlib.lines.Line2D, [], [], linestyle="none", marker="o")
    handles = [dot(color=colour, markersize=6, label=name) for name, colour in hue.items()]
    handles.append(dot(color=style.GREY, markersize=5, label="the domain's own neurons"))
    if rings:
        handles.append(dot(markerfacecolor="white", color=style.GREY, markersize=4.5, label=rings))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False,
        handletextpad=0.1, columnspacing=1.2, fontsize=8.5,
    )  # fmt: skip


@style.styled
def halves(tests: Mapping[str, Mapping[str, Any]], domains: Sequence[str]) -> Figure:
    """Draw the Jaccard index of the neurons of two halves by their size, a panel for each module.

    Args:
      tests: {module: {"examples": int[S], "halves": float[S, D_]}}.
      domains: The names of the domains, in the order of D_.
    """
    hue = style.palette(domains)
    figure = Figure(figsize=(11, 2.9))
    axes = figure.subplots(1, len(tests), squeeze=False, sharey=True)[0]
    for ax, (module, test) in zip(axes, tests.items(), strict=True):
        for domain, shared in zip(domains, np.transpose(test["halves"]), strict=True):
            ax.plot(test["examples"], shared, "o-", markersize=4, color=hue[domain], label=domain)
        ax.set(title=module, xlabel="examples of a domain in a half", ylim=(0, 1))
        ax.set_xticks(test["examples"])
        ax.grid(axis="y")
    axes[0].set_ylabel("shared neurons (Jaccard)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=8.5
    )
    return figure


@style.styled
def scatter(features: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw pictures on two principal components, a colour for each domain.

    Args:
      features: {module: {"points": {domain: float[N, 2]}, "share": float[2]}}.
    """
    hue = style.palette(list(next(iter(features.values()))["points"]))
    figure = Figure(figsize=(11, 4.4))
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    for ax, (module, of) in zip(axes, features.items(), strict=True):
        for domain, points in of["points"].items():
            x, y = np.transpose(points)
            ax.plot(
                x, y, "o", markersize=4.5, color=hue[domain], alpha=0.55, markeredgewidth=0,
                label=domain,
            )  # fmt: skip
        first, second = (f"{100 * share:.0f} % of the variance" for share in of["share"])
        ax.set(title=module, xlabel=f"first component, {first}", ylabel=f"second, {second}")
        ax.set(xticks=[], yticks=[])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=8.5
    )
    return figure


class TokenPanel(NamedTuple):
    """The words of a lens on one picture, as in `figures.token_panel`.

    Attributes:
      picture: uint8[height, width, 3].
      words: [rows][columns], the most likely word of each token.
      entropy: float[rows, columns], in nats.
      title: The title of the panel.
    """

    picture: np.ndarray
    words: Sequence[Sequence[str]]
    entropy: np.ndarray
    title: str


@style.styled
def overview(
    tokens: TokenPanel | None,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    overall: Mapping[str, Any] | None,
    change: np.ndarray,
    star: np.ndarray,
    titles: Mapping[str, str],
    bound: float,
) -> Figure:
    """Draw a summary: words on image tokens, entropy by layer, and the ablation matrix.

    Args:
      tokens: The words on a picture, if any.
      curves: {domain: {"mean", "low", "high"}}, the entropies of image tokens.
      overall: The stage boundaries of all domains together.
      change: float[D_, D_], the change of accuracy, as in `ablation_matrix`.
      star: bool[D_, D_], where the change is beyond chance.
      titles: {"curves": ..., "matrix": ...}.
      bound: The change of accuracy at the ends of the colour scale.
    """
    domains = list(curves)
    hue = style.palette(domains)
    widths = [*([1.0] if tokens else []), 1.2, 1.0]
    layout = ConstrainedLayoutEngine(compress=True, wspace=0.03)
    figure = Figure(figsize=(4.1 * sum(widths), 4.1), layout=layout)
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    if tokens:
        entropy = np.asarray(tokens.entropy)
        bounds = entropy.min(), entropy.max()
        axes[0].set_axis_off()
        figures.token_panel(axes[0], tokens.picture, tokens.words, entropy, bounds, 3.6)
        axes[0].set_title(tokens.title)
    lines, matrix = axes[-2:]
    figures.draw_curves(lines, curves, hue)
    figures.label_ends(lines, curves, hue)
    if overall:
        stage_plots.draw_stages(lines, overall)
    lines.set(xlabel="layer", ylabel="entropy of the lens, nats")
    lines.set_box_aspect(0.8)
    lines.set_title(titles["curves"])
    _matrix(matrix, change, domains, bound, star)
    matrix.set(xlabel="tested on", ylabel="neurons of")
    matrix.set_title(titles["matrix"])
    return figure


def _round_below(value: int) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is at most the value."""
    power = 10 ** (len(str(int(value))) - 1)
    return max(step * power for step in (1, 2, 5) if step * power <= value)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between two values; steps of 1, 2, 5 if there are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 1:
            break
    return ticks
