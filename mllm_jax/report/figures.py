"""Figures of plain arrays and dictionaries, one function each, in one style.

Every function returns a matplotlib Figure; `save` writes it. The same data give the same bytes on
the same matplotlib: the canvas is Agg, the font is matplotlib's own, and no date is written.

Rules of the style: colour-blind safe colours (Okabe and Ito) that mean the same domain in every
figure, small multiples rather than legends, labels on the data, no frames.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.image import AxesImage

from mllm_jax import store

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
INK, GREY, FAINT = "#222222", "#7A7A7A", "#E4E4E4"
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
}


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG, atomically and without a date."""
    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, format="png", metadata={"Software": None})
    store.write(path, png.getvalue())


def styled(draw):
    """Draws in the common style, on a canvas of its own and without global state."""

    @functools.wraps(draw)
    def figure_of(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure)
            return figure

    return figure_of


def palette(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: the fixed ones first, then as many as it takes from viridis."""
    more = len(names) - len(PALETTE)
    if more > 0:
        spare = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
        return {name: colors.to_hex(c) for name, c in zip(names, spare, strict=True)}
    return dict(zip(names, PALETTE, strict=False))


@styled
def neurons_per_layer(
    counts: Mapping[str, Mapping[str, Sequence[int]]], subtitles: Mapping[str, str]
) -> Figure:
    """Neurons of each domain by layer: a row a domain, a column a module, one scale in a column.

    Args:
        counts: {module: {domain: int[L]}}.
        subtitles: {module: a second line under its title}.
    """
    domains = list(next(iter(counts.values())))
    hue = palette(domains)
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
                    domain, rotation=0, ha="right", va="center", color=_dark(hue[domain]),
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
    write(title, xytext=(0, 19), fontweight="bold", fontsize=STYLE["axes.titlesize"])
    write(subtitle, xytext=(0, 6), color=GREY, fontsize=8)


def _many_layers(ax: Axes, values: np.ndarray, top: int, colour: str) -> None:
    ax.bar(np.arange(len(values)), values, width=0.78, color=colour)
    ax.set(xlim=(-0.7, len(values) - 0.3), ylim=(0, top * 1.25), yticks=[0, _round_below(top)])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    ax.grid(axis="y")
    ax.text(
        0.998, 1.0, f"{values.sum():,}", transform=ax.transAxes, ha="right", va="top",
        color=_dark(colour), path_effects=_halo(), fontweight="bold",
    )  # fmt: skip


def _one_layer(ax: Axes, value: int, top: int, colour: str) -> None:
    ax.barh([0], [value], height=0.5, color=colour)
    ax.text(
        value + top * 0.05, 0, f"{value:,}", va="center", color=_dark(colour), fontweight="bold"
    )
    ax.set(xlim=(0, top * 1.45), ylim=(-0.8, 0.8), xticks=[], yticks=[])
    ax.spines["bottom"].set_visible(False)


@styled
def ablation_matrix(
    selected: Mapping[str, np.ndarray],
    control: Mapping[str, np.ndarray],
    star: Mapping[str, np.ndarray],
    domains: Sequence[str],
    control_title: str,
) -> Figure:
    """Change of accuracy when a domain's neurons are off, and when random ones are.

    Args:
        selected: {module: float[D_, D_]}, rows are the masks, columns the data; nan where not
            measured.
        control: the same for random neurons; a module may be absent.
        star: {module: bool[D_, D_]}, where `selected` is beyond chance.
        domains: names of rows and columns.
        control_title: what the random row is.
    """
    both = [*selected.values(), *control.values()]
    bound = max(0.05, float(np.nanmax(np.abs(np.stack(both)), initial=0)))
    rows = [("domain neurons off", selected, star)]
    if control:
        rows.append((control_title, control, {}))
    cell = max(0.42 * len(domains), 1.7)  # as long as a title is
    width = 2.3 + (cell + 0.35) * len(selected)
    figure = Figure(figsize=(width, (cell + 0.5) * len(rows) + 0.9))
    grid = figure.subplots(len(rows), len(selected), squeeze=False)
    for row, (title, values, marks) in enumerate(rows):
        for column, module in enumerate(selected):
            ax = grid[row, column]
            if module not in values:
                ax.set_axis_off()
                continue
            image = _matrix(ax, values[module], domains, bound, marks.get(module))
            ax.tick_params(labelleft=column == 0, labelbottom=row == len(rows) - 1)
            if row == 0:
                ax.set_title(module)
        grid[row, 0].set_ylabel(title, color=INK, fontweight="bold")
    for ax in grid[-1]:
        ax.set_xlabel("tested on")
    bar = figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label("change of accuracy, points")
    told = "framed: tested on its own domain", "bold with *: beyond chance, corrected for all cells"
    figure.supxlabel((" · " if width > 6 else "\n").join(told), color=GREY, fontsize=8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: _points(value))
    return figure


def _matrix(
    ax: Axes, values: np.ndarray, domains: Sequence[str], bound: float, star: np.ndarray | None
):
    """A heat map of accuracy differences, in points; a frame on each domain's own neurons."""
    shades = matplotlib.colormaps["RdBu"].with_extremes(bad="#F2F2F2")
    image = ax.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=-bound, vmax=bound)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        mark = "*" if star is not None and star[row, column] else ""
        ax.text(
            column, row, f"{_points(value)}{mark}", ha="center", va="center", fontsize=7.5,
            in_layout=False,
            color=_ink_on(image.cmap(image.norm(value))), fontweight="bold" if mark else "normal",
        )  # fmt: skip
    for own in range(min(values.shape)):
        frame = matplotlib.patches.Rectangle(
            (own - 0.5, own - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.1
        )
        ax.add_patch(frame)
    _name_cells(ax, domains)
    return image


def _name_cells(ax: Axes, names: Sequence[str]) -> None:
    places = range(len(names))
    ax.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, names)
    ax.tick_params(length=0, colors=INK)
    ax.spines[:].set_visible(False)


@styled
def deviation(
    selected: Mapping[str, Mapping[str, Mapping[str, float]]],
    control: Mapping[str, Mapping[str, Mapping[str, float]]],
    measures: Mapping[str, str],
) -> Figure:
    """How far hidden states move: a dot for the domain's neurons, a ring for random ones.

    Args:
        selected: {module: {kind: {domain: {measure: value}}}}.
        control: the same for random neurons; anything may be absent.
        measures: {measure: axis label}, a row of panels each.
    """
    first = next(iter(selected.values()))
    kinds, domains = list(first), list(next(iter(first.values())))
    hue = palette(domains)
    height = 0.16 * len(domains) * len(kinds) + 0.75
    figure = Figure(figsize=(11, height * len(measures) + 0.4))
    grid = figure.subplots(len(measures), len(selected), squeeze=False, sharey=True, sharex="row")
    step = 0.8 / len(domains)

    for row, (measure, label) in enumerate(measures.items()):
        values = np.array(
            [
                value
                for source in (selected, control)
                for by_kind in source.values()
                for by_domain in by_kind.values()
                for measured in by_domain.values()
                for name, value in measured.items()
                if name == measure
            ]
        )
        # a logarithmic scale has no zero; an empty mask, which moves nothing, stands at the edge
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
            ax.set(yticks=range(len(kinds)), ylim=(len(kinds) - 0.45, -0.55), xlabel=label)
            ax.set_yticklabels(kinds)
            ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
            ax.set(xscale="log", xlim=(floor * 0.9, max(values.max(initial=1e-9), floor) * 1.3))
            ticks = _log_ticks(1.5 * floor, ax.get_xlim()[1])
            zero = [floor] if (values <= 0).any() else []
            ax.set_xticks([*zero, *ticks], [*("0" for _ in zero), *(f"{tick:g}" for tick in ticks)])
            ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            ax.grid(axis="x")
            for line in np.arange(0.5, len(kinds) - 1):
                ax.axhline(line, color=FAINT, linewidth=0.6)
            ax.spines["left"].set_visible(False)
            if row == 0:
                ax.set_title(module)
    _key(figure, hue, rings=bool(control))
    return figure


def _dumbbell(
    ax: Axes, y: float, own: float | None, other: float | None, colour: str, floor: float
) -> None:
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


def _key(figure: Figure, hue: Mapping[str, str], *, rings: bool) -> None:
    """One line above the panels that names the colours and the two marks."""
    dot = functools.partial(matplotlib.lines.Line2D, [], [], linestyle="none", marker="o")
    handles = [dot(color=colour, markersize=6, label=name) for name, colour in hue.items()]
    handles.append(dot(color=GREY, markersize=5, label="the domain's own neurons"))
    if rings:
        handles.append(
            dot(markerfacecolor="white", color=GREY, markersize=4.5, label="random neurons")
        )
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False,
        handletextpad=0.1, columnspacing=1.2, fontsize=8.5,
    )  # fmt: skip


@styled
def entropy_curves(
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    stages: Mapping[str, Mapping] | None = None,
    overall: Mapping | None = None,
    staged_kind: str = "image",
) -> Figure:
    """Entropy of the logit lens by layer, a panel a token kind, with bands and stage boundaries.

    Args:
        curves: {domain: {kind: {"mean", "low", "high": float[L]}}}, nats.
        stages: {domain: {"boundaries", "low", "high"}}; boundaries None where undecided.
        overall: the same for all domains together.
        staged_kind: the kind of token that the stages were found on.
    """
    kinds = list(dict.fromkeys(kind for by_kind in curves.values() for kind in by_kind))
    hue = palette(list(curves))
    strip = 0.15 * len(curves) + 0.6 if stages else 0
    figure = Figure(figsize=(11, 4.2 + strip))
    grid = figure.subplots(
        2, len(kinds), squeeze=False, sharex=True, height_ratios=[4.2, max(strip, 1e-3)]
    )
    above, below = grid
    for ax in above[1:]:
        ax.sharey(above[0])
    for ax, kind in zip(above, kinds, strict=True):
        _lines(ax, {d: by_kind[kind] for d, by_kind in curves.items() if kind in by_kind}, hue)
        ax.set_title(f"{kind} tokens")
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("layer")
    above[0].set_ylabel("entropy of the lens, nats")
    for ax, kind in zip(above, kinds, strict=True):  # the shared scale is known only now
        _end_labels(ax, {d: by_kind[kind] for d, by_kind in curves.items() if kind in by_kind}, hue)
    for ax, lower, kind in zip(above, below, kinds, strict=True):
        staged = kind == staged_kind
        if staged and overall:
            _stage_lines(ax, overall)
        if staged and stages:
            _stage_strip(lower, stages, hue)
        else:
            lower.set_axis_off()
    return figure


def _lines(ax: Axes, curves: Mapping[str, Mapping], hue: Mapping[str, str]) -> None:
    for name, curve in curves.items():
        layers = np.arange(len(curve["mean"]))
        ax.fill_between(
            layers, curve["low"], curve["high"], color=hue[name], alpha=0.16, linewidth=0
        )
        ax.plot(layers, curve["mean"], color=hue[name])
    ax.set_xlim(0, len(layers) - 1)
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))


def _end_labels(ax: Axes, curves: Mapping[str, Mapping], hue: Mapping[str, str]) -> None:
    """Each curve's name at its right end."""
    ends = {name: curve["mean"][-1] for name, curve in curves.items()}
    low, high = ax.get_ylim()
    places = _spread(list(ends.values()), (high - low) * 0.055)
    for (name, end), place in zip(ends.items(), places, strict=True):
        ax.annotate(
            name, (1, end), (1.03, place), xycoords=ax.get_yaxis_transform(),
            textcoords=ax.get_yaxis_transform(), color=_dark(hue[name]), va="center", fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": hue[name], "linewidth": 0.6, "shrinkA": 1,
                        "shrinkB": 1, "relpos": (0, 0.5)},
        )  # fmt: skip


STAGE_NAMES = ("alignment", "processing", "token selection")


def _stage_lines(ax: Axes, stage: Mapping) -> None:
    """Vertical lines between layers, each with the band of its interval, and the stages' names."""
    if stage["boundaries"] is None:
        ax.text(
            0.02, 0.98, "stages undecided", transform=ax.transAxes, ha="left", va="top",
            color=GREY, fontsize=8.5, style="italic",
        )  # fmt: skip
        return
    last = ax.get_lines()[0].get_xdata()[-1]
    for boundary, low, high in zip(stage["boundaries"], stage["low"], stage["high"], strict=True):
        ax.axvspan(low - 0.5, high - 0.5, color=INK, alpha=0.07, linewidth=0)
        ax.axvline(boundary - 0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    edges = [0, *(b - 0.5 for b in stage["boundaries"]), last]
    for name, left, right in zip(STAGE_NAMES, edges, edges[1:], strict=False):
        between = name == STAGE_NAMES[1] and right - left < last / 4  # too short for its name
        ax.text(
            (left + right) / 2, 0.93 if between else 0.985, name,
            transform=ax.get_xaxis_transform(), ha="center", va="top", color=GREY, fontsize=8,
            style="italic", path_effects=_halo(),
        )  # fmt: skip


def _stage_strip(ax: Axes, stages: Mapping[str, Mapping], hue: Mapping[str, str]) -> None:
    """Each domain's boundaries and their intervals."""
    for row, (name, stage) in enumerate(stages.items()):
        decided = stage["boundaries"] is not None
        for low, high in zip(stage["low"] or (), stage["high"] or (), strict=True):
            ax.plot(
                [low - 0.5, high - 0.5], [row, row], color=hue[name], linewidth=2.4,
                alpha=0.5 if decided else 0.25,
            )  # fmt: skip
        for boundary in stage["boundaries"] or ():
            ax.plot([boundary - 0.5], [row], "o", markersize=4.5, color=hue[name])
        ax.text(
            1.025, row, name if decided else f"{name}: undecided", color=_dark(hue[name]),
            transform=ax.get_yaxis_transform(), va="center", fontsize=7.5,
        )  # fmt: skip
    ax.set(ylim=(len(stages) - 0.4, -0.6), yticks=[])
    ax.set_title("stage boundaries with 95 % intervals", fontsize=8.5, fontweight="normal", pad=3)
    ax.tick_params(labelbottom=False, length=0)
    ax.grid(axis="x")
    ax.spines[:].set_visible(False)


@styled
def token_map(
    picture: np.ndarray,
    words: Sequence[Sequence[Sequence[str]]],
    entropy: np.ndarray,
    titles: Sequence[str],
) -> Figure:
    """A picture, and what a lens reads from each of its image tokens.

    Args:
        picture: uint8[height, width, 3].
        words: [panels][rows][columns], the most likely word of each token.
        entropy: float[panels, rows, columns], nats.
        titles: one a panel.
    """
    entropy = np.asarray(entropy, np.float64)
    side = 0.46 * entropy.shape[2]  # inches; a word needs about half of one
    side = max(3.0, side) if side < 12 else 4.5  # so many have no room for words
    panels = 1 + len(words)
    columns = panels if side * panels <= 13 else min(2, panels)
    rows = -(-panels // columns)
    aspect = picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(side * columns + 0.9, (side * aspect + 0.35) * rows + 0.1))
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    first, *others = grid.flat
    first.imshow(picture)
    first.set_title("picture")
    bounds = entropy.min(), entropy.max()
    for ax, panel, values, title in zip(others, words, entropy, titles, strict=False):
        image = _token_panel(ax, picture, panel, values, bounds, side)
        ax.set_title(title)
    bar = figure.colorbar(image, ax=grid, shrink=0.7, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.set_label("entropy, nats")
    return figure


def _token_panel(
    ax: Axes,
    picture: np.ndarray,
    words: Sequence[Sequence[str]],
    entropy: np.ndarray,
    bounds: tuple[float, float],
    side: float,
) -> AxesImage:
    """Words over a pale picture; the surer the lens, the deeper the colour. side: inches."""
    height, width = picture.shape[:2]
    rows, columns = entropy.shape
    pale = (picture.mean(axis=2) + 120) / 390
    extent = (0, width, height, 0)
    ax.imshow(pale, cmap="gray", vmin=0, vmax=1, extent=extent)
    image = ax.imshow(
        entropy, cmap="YlGnBu_r", vmin=bounds[0], vmax=bounds[1], alpha=0.62, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    if side / columns >= 0.36:  # smaller cells cannot hold a word that can be read
        _words(ax, words, entropy, image, pale, 72 * side / columns * 0.9)
    ax.vlines(np.arange(1, columns) * width / columns, 0, height, "white", linewidth=0.7)
    ax.hlines(np.arange(1, rows) * height / rows, 0, width, "white", linewidth=0.7)
    ax.set(xlim=(0, width), ylim=(height, 0))
    return image


def _words(
    ax: Axes,
    words: Sequence[Sequence[str]],
    entropy: np.ndarray,
    image: AxesImage,
    pale: np.ndarray,
    across: float,
) -> None:
    """A word in each cell, black or white as its ground asks; across: points it may take."""
    rows, columns = entropy.shape
    height, width = pale.shape
    longest = max(4, int(across / (0.62 * 5.6)))
    for (row, column), value in np.ndenumerate(entropy):
        word = shown(words[row][column], longest)
        cell = pale[
            row * height // rows : -(-(row + 1) * height // rows),
            column * width // columns : -(-(column + 1) * width // columns),
        ]
        ground = 0.62 * np.array(image.cmap(image.norm(value))[:3]) + 0.38 * cell.mean()
        ax.text(
            (column + 0.5) * width / columns, (row + 0.5) * height / rows, word,
            ha="center", va="center", color=_ink_on(ground), in_layout=False,
            fontsize=min(8, across / (0.62 * len(word))),
        )  # fmt: skip


def shown(word: str, longest: int = 10) -> str:
    """A token as a figure can show it: no outer spaces, cut if long, ▯ for what has no glyph."""
    word = word.replace("\n", "↵").replace("\t", "⇥").strip(" ▁Ġ") or "␣"
    word = "".join(sign if ord(sign) in _glyphs() else "▯" for sign in word)
    return word if len(word) <= longest else word[: longest - 1] + "…"


@functools.cache
def _glyphs() -> frozenset[int]:
    font = matplotlib.font_manager.findfont(STYLE["font.family"])
    return frozenset(FT2Font(font).get_charmap())


@styled
def overlap(
    jaccard: Mapping[str, np.ndarray],
    domains_per_neuron: Mapping[str, Sequence[int]],
    domains: Sequence[str],
    members: str = "domains that a neuron belongs to",
) -> Figure:
    """How far domains share neurons: pairs above, number of domains a neuron has below.

    Args:
        jaccard: {module: float[D_, D_]}.
        domains_per_neuron: {module: int[D_ + 1]}, neurons with 0, 1, ... domains.
        domains: names of rows and columns.
        members: what is counted below; with selectors in place of domains, selectors.
    """
    figure = Figure(figsize=(1.6 + 3.1 * len(jaccard), 5.0))
    grid = figure.subplots(2, len(jaccard), squeeze=False, height_ratios=[3, 1.6])
    pairs = ~np.tri(len(domains), dtype=bool).T
    shared = [np.asarray(values)[pairs] for values in jaccard.values()]
    bound = max(0.05, float(np.max(shared, initial=0)))
    for column, (module, values) in enumerate(jaccard.items()):
        above, below = grid[:, column]
        lower = np.where(pairs, values, np.nan)[1:, :-1]
        image = above.imshow(np.ma.masked_invalid(lower), cmap="BuPu", vmin=0, vmax=bound)
        for (row, col), value in np.ndenumerate(lower):
            if not np.isnan(value):
                above.text(
                    col, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                    color=_ink_on(image.cmap(image.norm(value))),
                )  # fmt: skip
        _name_cells(above, domains[:-1])
        above.set_yticks(range(len(domains) - 1), domains[1:] if column == 0 else [])
        above.set_title(module)

        counts = np.asarray(domains_per_neuron[module])
        bars = below.bar(range(len(counts)), counts, width=0.7, color="#6B7FA8")
        below.bar_label(bars, [f"{n:,}" if n else "" for n in counts], fontsize=7.5, padding=2)
        below.set(xticks=range(len(counts)), yticks=[], xlabel=members)
        below.margins(y=0.15)
        below.spines["left"].set_visible(False)
    grid[0, 0].set_ylabel("shared neurons\n(Jaccard)", color=INK, fontweight="bold")
    grid[1, 0].set_ylabel("neurons", color=INK, fontweight="bold")
    return figure


@styled
def halves(found: Mapping[str, Mapping], domains: Sequence[str]) -> Figure:
    """Jaccard index of the neurons of two halves by their size, a panel a module.

    Args:
        found: {module: {"examples": int[S], "halves": float[S, D_]}}.
    """
    hue = palette(domains)
    figure = Figure(figsize=(11, 2.9))
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for ax, (module, test) in zip(panels, found.items(), strict=True):
        for domain, shared in zip(domains, np.transpose(test["halves"]), strict=True):
            ax.plot(test["examples"], shared, "o-", markersize=4, color=hue[domain], label=domain)
        ax.set(title=module, xlabel="examples of a domain in a half", ylim=(0, 1))
        ax.set_xticks(test["examples"])
        ax.grid(axis="y")
    panels[0].set_ylabel("shared neurons (Jaccard)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=8.5
    )
    return figure


@styled
def scatter(found: Mapping[str, Mapping]) -> Figure:
    """Points of two principal components, a panel a module, each domain's name at its middle.

    Args:
        found: {module: {"points": {domain: float[N, 2]}, "share": float[2]}}.
    """
    hue = palette(list(next(iter(found.values()))["points"]))
    figure = Figure(figsize=(11, 4.4))
    for ax, (module, of) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        for domain, points in of["points"].items():
            x, y = np.transpose(points)
            ax.plot(x, y, "o", markersize=4.5, color=hue[domain], alpha=0.55, markeredgewidth=0)
            ax.text(
                x.mean(), y.mean(), domain, color=_dark(hue[domain]), ha="center",
                va="center", fontweight="bold", path_effects=_halo(),
            )  # fmt: skip
        first, second = (f"{100 * share:.0f} % of the variance" for share in of["share"])
        ax.set(title=module, xlabel=f"first component, {first}", ylabel=f"second, {second}")
        ax.set(xticks=[], yticks=[])
    return figure


@styled
def accuracy(baseline: Mapping[str, Mapping[str, float]]) -> Figure:
    """Accuracy of each domain with its interval, and chance.

    Args:
        baseline: {domain: {"accuracy", "low", "high", "chance", "n"}}; chance None for no such.
    """
    hue = palette(list(baseline))
    figure = Figure(figsize=(11, 0.4 * len(baseline) + 0.75))
    ax = figure.subplots()
    for row, (domain, score) in enumerate(baseline.items()):
        ax.plot(
            [score["low"], score["high"]], [row, row], color=hue[domain], linewidth=5, alpha=0.3
        )
        ax.plot([score["accuracy"]], [row], "o", markersize=8, color=hue[domain])
        if score["chance"] is not None:
            ax.plot([score["chance"]] * 2, [row - 0.3, row + 0.3], color=GREY, linewidth=1.6)
        ax.text(
            1.02, row, f"{100 * score['accuracy']:.0f} %", transform=ax.get_yaxis_transform(),
            va="center", ha="left", color=_dark(hue[domain]), fontweight="bold",
        )  # fmt: skip
        ax.text(
            1.08, row, f"n = {score['n']:,}", transform=ax.get_yaxis_transform(), va="center",
            color=GREY, fontsize=8,
        )  # fmt: skip
    first = next(iter(baseline.values()))
    if first["chance"] is not None:
        ax.text(first["chance"], -0.42, "chance", ha="center", va="bottom", color=GREY, fontsize=8)
    ax.set(xlim=(0, 1), ylim=(len(baseline) - 0.5, -0.75), xlabel="accuracy, 95 % interval")
    ax.set_yticks(range(len(baseline)), list(baseline))
    ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    return figure


@styled
def overview(
    tokens: tuple[np.ndarray, Sequence[Sequence[str]], np.ndarray, str] | None,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    overall: Mapping | None,
    change: np.ndarray,
    star: np.ndarray,
    titles: Mapping[str, str],
) -> Figure:
    """The study in one picture: words on image tokens, entropy by layer, the ablation matrix.

    Args:
        tokens: (picture, words, entropy, title) as in `token_map`, of one layer; None for none.
        curves: {domain: {"mean", "low", "high"}} of image tokens.
        overall: stage boundaries of all domains together.
        change: float[D_, D_], change of accuracy, as in `ablation_matrix`.
        star: bool[D_, D_], where it is beyond chance.
        titles: {"curves": ..., "matrix": ...}.
    """
    domains = list(curves)
    hue = palette(domains)
    widths = [*([1.0] if tokens else []), 1.2, 1.0]
    figure = Figure(figsize=(4.1 * sum(widths), 4.1), layout="compressed")
    figure.get_layout_engine().set(wspace=0.03)
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    if tokens:
        picture, words, entropy, title = tokens
        entropy = np.asarray(entropy)
        panels[0].set_axis_off()
        _token_panel(panels[0], picture, words, entropy, (entropy.min(), entropy.max()), 3.6)
        panels[0].set_title(title)
    lines, matrix = panels[-2:]
    _lines(lines, curves, hue)
    _end_labels(lines, curves, hue)
    if overall:
        _stage_lines(lines, overall)
    lines.set(xlabel="layer", ylabel="entropy of the lens, nats")
    lines.set_box_aspect(0.8)
    lines.set_title(titles["curves"])
    bound = max(0.05, float(np.nanmax(np.abs(change), initial=0)))
    _matrix(matrix, change, domains, bound, star)
    matrix.set(xlabel="tested on", ylabel="neurons of")
    matrix.set_title(titles["matrix"])
    return figure


@styled
def forest(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    hue: Mapping[str, str],
    label: str,
    *,
    against: str | None = None,
    shown: Callable[[float], str] = "{:.2f}".format,
) -> Figure:
    """Values with intervals: a row of panels a group, a panel a task, a line a name.

    Args:
        panels: {group: {task: {name: {"mean", "low", "high"}}}}; a group may lack names and tasks.
        hue: {name: colour}, in the order of the lines.
        label: of the axis.
        against: the name whose value is a line through its panel, to compare with; "0" is zero.
        shown: how a value is written.
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
            at = 0.0 if against == "0" else lines.get(against, {}).get("mean")
            if at is not None:
                ax.axvline(at, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
            for y, name in enumerate(names[group]):
                if name in lines:
                    _forest_line(ax, y, lines[name], hue[name], shown)
            ax.set(ylim=(len(names[group]) - 0.4, -0.6), yticks=range(len(names[group])))
            first = ax is grid[row, 0]
            ax.set_yticklabels(names[group] if first else [])
            ax.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
            ax.tick_params(labelbottom=row == len(panels) - 1)
            ax.grid(axis="x")
            ax.spines["left"].set_visible(False)
            if row == 0:
                ax.set_title(task)
        if group:
            grid[row, 0].annotate(
                group, (0, 1), (-6, 2), xycoords="axes fraction", textcoords="offset points",
                ha="right", va="bottom", color=GREY, fontsize=8.5, style="italic",
            )  # fmt: skip
    for ax in grid[-1]:
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.set_xlabel(label)
    return figure


def _forest_line(ax: Axes, y: float, value: Mapping[str, float], colour: str, shown) -> None:
    ax.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=4, alpha=0.3)
    ax.plot([value["mean"]], [y], "o", markersize=6, color=colour, markeredgewidth=0)
    ax.text(
        1.02, y, shown(value["mean"]).replace("-", "\N{MINUS SIGN}"), va="center",
        transform=ax.get_yaxis_transform(), color=_dark(colour), fontsize=8, fontweight="bold",
    )  # fmt: skip


@styled
def slopes(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], label: str
) -> Figure:
    """From stage to stage, a line a task, a panel a measure.

    Args:
        panels: {title: {task: {stage: {"mean", "low", "high"}}}}; stages in order.
        label: of the values.
    """
    tasks = list(dict.fromkeys(task for by_task in panels.values() for task in by_task))
    hue = palette(tasks)
    stages = {
        title: list(dict.fromkeys(stage for points in by_task.values() for stage in points))
        for title, by_task in panels.items()
    }
    figure = Figure(figsize=(11, 3.9))
    axes = figure.subplots(
        1, len(panels), squeeze=False, sharey=True, width_ratios=[len(s) for s in stages.values()]
    )[0]
    for ax, (title, by_task) in zip(axes, panels.items(), strict=True):
        places = {stage: place for place, stage in enumerate(stages[title])}
        for number, (task, points) in enumerate(by_task.items()):
            shift = 0.035 * (
                number - (len(by_task) - 1) / 2
            )  # so that intervals stand side by side
            x = [places[stage] + shift for stage in points]
            mean, low, high = (
                [point[key] for point in points.values()] for key in ("mean", "low", "high")
            )
            ax.vlines(x, low, high, color=hue[task], linewidth=3.5, alpha=0.25)
            ax.plot(x, mean, "o-", color=hue[task], linewidth=1.6, markersize=5.5)
        ax.set(xlim=(-0.3, len(places) - 0.7), xticks=range(len(places)))
        ax.set_xticklabels(places)
        ax.tick_params(axis="x", length=0, labelsize=9, labelcolor=INK)
        ax.grid(axis="y")
        ax.set_title(title)
    axes[0].set_ylabel(label)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(0, low), min(1.02, high))
    for ax, by_task in zip(axes, panels.values(), strict=True):
        ends = {task: {"mean": [p["mean"] for p in points.values()]}
                for task, points in by_task.items()}  # fmt: skip
        _end_labels(ax, ends, hue)
    return figure


@styled
def depth(
    curves: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]],
    hue: Mapping[str, str],
    levels: Mapping[str, float],
    label: str,
) -> Figure:
    """What a probe reads, by layer: a row of panels a kind of token, a panel a task.

    Args:
        curves: {kind: {task: {variant: {"mean", "low", "high": float[L]}}}}.
        hue: {variant: colour}.
        levels: {task: the value before the projection}, a line through its panels.
        label: of the values.
    """
    tasks = list(dict.fromkeys(task for by_task in curves.values() for task in by_task))
    figure = Figure(figsize=(11, 2.35 * len(curves) + 0.35))
    grid = figure.subplots(len(curves), len(tasks), squeeze=False, sharex=True, sharey=True)
    for row, (kind, by_task) in enumerate(curves.items()):
        for ax, task in zip(grid[row], tasks, strict=True):
            _lines(ax, by_task[task], hue)
            if task in levels:
                ax.axhline(levels[task], color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
                ax.text(
                    0.99, levels[task], "before the projection", ha="right", va="bottom",
                    transform=ax.get_yaxis_transform(), color=GREY, fontsize=7.5, style="italic",
                    path_effects=_halo(),
                )  # fmt: skip
            if row == 0:
                ax.set_title(task)
        grid[row, 0].set_ylabel(f"{kind}\n{label}")
    for ax in grid[-1]:
        ax.set_xlabel("layer")
    for ax, by_task in zip(grid[:, -1], curves.values(), strict=True):
        _end_labels(ax, by_task[tasks[-1]], hue)
    return figure


@styled
def migration(
    neurons: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], hue: Mapping[str, str]
) -> Figure:
    """Neurons that a domain kept, lost and gained: a panel a module, a bar a variant.

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
                found, y = by_task[task][variant], i + (j - (len(variants) - 1) / 2) * step
                lost, gained = found["before"] - found["kept"], found["after"] - found["kept"]
                bar = functools.partial(ax.barh, y, height=0.8 * step)
                bar(lost, left=-lost, color=FAINT)
                bar(found["kept"], color=hue[variant])
                bar(gained, left=found["kept"], color=hue[variant], alpha=0.35)
                ax.text(
                    1.02, y, f"{found['jaccard']:.2f}", transform=ax.get_yaxis_transform(),
                    va="center", fontsize=8, color=_dark(hue[variant]),
                )  # fmt: skip
        ax.axvline(0, color=GREY, linewidth=0.6)
        ax.use_sticky_edges = False  # bars keep a margin
        ax.set(ylim=(len(tasks) - 0.5, -0.5), yticks=range(len(tasks)), xlabel="neurons")
        ax.set_yticklabels(tasks if ax is axes[0] else [])
        ax.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        ax.set_title(module)
        ax.annotate(
            "Jaccard", (1.02, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
            color=GREY, fontsize=7.5,
        )  # fmt: skip
    patch = matplotlib.patches.Patch
    handles = [
        patch(color=FAINT, label="lost"),
        *(patch(color=hue[name], label=f"kept, {name}") for name in variants),
        *(patch(color=hue[name], alpha=0.35, label=f"gained, {name}") for name in variants),
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False,
        handlelength=1.1, handleheight=0.9, columnspacing=1.4, fontsize=8.5,
    )  # fmt: skip
    return figure


def _halo() -> list:
    return [patheffects.withStroke(linewidth=2.5, foreground="white")]


def _dark(colour: str) -> np.ndarray:
    """The colour, dark enough to read as text on white."""
    return np.array(colors.to_rgb(colour)) * 0.78


def _ink_on(colour) -> str:
    """Black or white, whichever reads better on the colour."""
    luminance = np.dot(colors.to_rgb(colour), [0.2126, 0.7152, 0.0722])
    return INK if luminance > 0.5 else "white"


def _points(value: float) -> str:
    """A difference of accuracy in percentage points."""
    points = 100 * value
    text = f"{points:+.0f}" if abs(points) >= 9.95 else f"{points:+.1f}"
    return "0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _round_below(value: int) -> int:
    """The largest of 1, 2, 5, 10, 20, 50 ... that is not above the value."""
    power = 10 ** (len(str(int(value))) - 1)
    return max(step * power for step in (1, 2, 5) if step * power <= value)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the two; steps of 1, 2, 5 where those are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 1:
            break
    return ticks


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Places as near to the values as keeps neighbours a gap apart."""
    order = np.argsort(values, kind="stable")
    offset = gap * np.arange(len(values))
    target = np.asarray(values, np.float64)[order] - offset
    # pool neighbours that would overlap (isotonic regression), then put the gaps back
    blocks: list[list[float]] = []
    for value in target:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    placed = np.concatenate([[np.mean(block)] * len(block) for block in blocks]) + offset
    places = np.empty(len(values))
    places[order] = placed
    return places.tolist()
