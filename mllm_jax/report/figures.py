"""Figures that several studies share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.image import AxesImage

from mllm_jax.report import style


def name_cells(ax: Axes, names: Sequence[str], columns: Sequence[str] = ()) -> None:
    """Label rows and columns of a matrix; both with the same names by default."""
    ticks = range(len(names))
    ax.set_xticks(ticks, columns or names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, names)
    ax.tick_params(length=0, colors=style.INK)
    ax.spines[:].set_visible(False)


def draw_curves(ax: Axes, curves: Mapping[str, Mapping], hue: Mapping[str, str]) -> None:
    """Draw means by layer with their intervals, a curve for each name; see `charts.curves`."""
    for name, curve in curves.items():
        layers = np.asarray(curve.get("at", range(len(curve["mean"]))))
        if "low" in curve:
            ax.fill_between(
                layers, curve["low"], curve["high"], color=hue[name], alpha=0.16, linewidth=0
            )
        ax.plot(layers, curve["mean"], color=hue[name])
    ax.set_xlim(0, layers[-1])
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))


def label_ends(ax: Axes, curves: Mapping[str, Mapping], hue: Mapping[str, str]) -> None:
    """Write the name of each curve at its right end."""
    ends = {name: curve["mean"][-1] for name, curve in curves.items()}
    low, high = ax.get_ylim()
    heights = _separate(list(ends.values()), (high - low) * 0.055)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        ax.annotate(
            name, (1, end), (1.03, height), xycoords=ax.get_yaxis_transform(),
            textcoords=ax.get_yaxis_transform(), color=style.darken(hue[name]), va="center",
            fontsize=8.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": hue[name], "linewidth": 0.6, "shrinkA": 1,
                        "shrinkB": 1, "relpos": (0, 0.5)},
        )  # fmt: skip


@style.styled
def token_map(
    picture: np.ndarray,
    words: Sequence[Sequence[Sequence[str]]],
    entropy: np.ndarray,
    titles: Sequence[str],
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """Draw a picture, and the word and entropy of a lens at each of its image tokens.

    Args:
      picture: uint8[height, width, 3].
      words: [panels][rows][columns], the most likely word of each token.
      entropy: float[panels, rows, columns], in nats.
      titles: The title of each panel.
      bounds: The entropies at the ends of the colour scale; of this picture by default.
    """
    entropy = np.asarray(entropy, np.float64)
    side = 0.46 * entropy.shape[2]  # inches; a word needs about 0.46 of them
    # The cells of a larger grid are too small for words.
    side = max(3.0, side) if side < 12 else 4.5
    panels = 1 + len(words)
    widest = panels if side * panels <= 13 else min(3 if side < 4.4 else 2, panels)
    columns = next((n for n in range(widest, 1, -1) if panels % n == 0), widest)  # fill all rows
    rows = -(-panels // columns)
    aspect = picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(side * columns + 0.9, (side * aspect + 0.35) * rows + 0.1))
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    first, *others = grid.flat
    first.imshow(picture)
    first.set_title("picture")
    _draw_grid(first, picture.shape[:2], entropy.shape[1:])
    bounds = bounds or (float(entropy.min()), float(entropy.max()))
    for ax, panel, values, title in zip(others, words, entropy, titles, strict=False):
        image = token_panel(ax, picture, panel, values, bounds, side)
        ax.set_title(title)
    bar = figure.colorbar(image, ax=grid, shrink=0.7, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.set_label("entropy, nats")
    return figure


def token_panel(
    ax: Axes,
    picture: np.ndarray,
    words: Sequence[Sequence[str]],
    entropy: np.ndarray,
    bounds: tuple[float, float],
    side: float,
) -> AxesImage:
    """Draw words and entropies as cells; the lower an entropy, the deeper its colour.

    Args:
      ax: The axes to draw on.
      picture: uint8[height, width, 3], whose shape the cells fill.
      words: [rows][columns], the most likely word of each token.
      entropy: float[rows, columns], in nats.
      bounds: The entropies at the ends of the colour scale.
      side: The width of the panel in inches.
    """
    height, width = picture.shape[:2]
    rows, columns = entropy.shape
    image = ax.imshow(
        entropy, cmap="YlGnBu_r", vmin=bounds[0], vmax=bounds[1],
        extent=(0, width, height, 0), interpolation="nearest",
    )  # fmt: skip
    if side / columns >= 0.36:  # words in smaller cells would be illegible
        _write_words(ax, words, entropy, image, 72 * side / columns * 0.9)
    _draw_grid(ax, (height, width), (rows, columns))
    return image


def _draw_grid(ax: Axes, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Draw the borders of the patches of a picture."""
    (height, width), (rows, columns) = size, grid
    ax.vlines(np.arange(1, columns) * width / columns, 0, height, "white", linewidth=0.7)
    ax.hlines(np.arange(1, rows) * height / rows, 0, width, "white", linewidth=0.7)
    ax.set(xlim=(0, width), ylim=(height, 0))


def _write_words(
    ax: Axes,
    words: Sequence[Sequence[str]],
    entropy: np.ndarray,
    image: AxesImage,
    width_in_points: float,
) -> None:
    """Write a word in each cell, in black or white by the brightness of its background."""
    rows, columns = entropy.shape
    _, width, height, _ = image.get_extent()
    longest = max(4, int(width_in_points / (0.62 * 5.6)))
    for (row, column), value in np.ndenumerate(entropy):
        word = printable(words[row][column], longest)
        background = image.cmap(image.norm(value))
        ax.text(
            (column + 0.5) * width / columns, (row + 0.5) * height / rows, word,
            ha="center", va="center", color=style.text_colour_on(background), in_layout=False,
            fontsize=min(8, width_in_points / (0.62 * len(word))),
        )  # fmt: skip


def printable(word: str, longest: int = 10) -> str:
    """Return a token as text for a figure: stripped, cut if long, with ▯ for missing glyphs."""
    word = word.replace("\n", "↵").replace("\t", "⇥").strip(" ▁Ġ")
    word = word if word.strip() else "␣"  # such as a no-break space
    word = "".join(letter if ord(letter) in _glyphs() else "▯" for letter in word)
    return word if len(word) <= longest else word[: longest - 1] + "…"


@functools.cache
def _glyphs() -> frozenset[int]:
    """Return the code points that the font of all figures has."""
    font = matplotlib.font_manager.findfont(style.STYLE["font.family"])
    return frozenset(FT2Font(font).get_charmap())


@style.styled
def overlap(
    jaccard: Mapping[str, np.ndarray],
    domains_per_neuron: Mapping[str, Sequence[int]],
    domains: Sequence[str],
    members: str = "domains of a neuron",
) -> Figure:
    """Draw the neurons that pairs of domains share, and the number of domains of each neuron.

    Args:
      jaccard: {module: float[D_, D_]}, the Jaccard indices of pairs.
      domains_per_neuron: {module: int[D_ + 1]}, the numbers of neurons with 0, 1, ... domains.
      domains: The names of rows and columns.
      members: The label of the lower panels, for something other than domains.
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
                    color=style.text_colour_on(image.cmap(image.norm(value))),
                )  # fmt: skip
        name_cells(above, domains[:-1])
        above.set_yticks(range(len(domains) - 1), domains[1:] if column == 0 else [])
        above.set_title(module)

        counts = np.asarray(domains_per_neuron[module])
        bars = below.bar(range(len(counts)), counts, width=0.7, color="#6B7FA8")
        below.bar_label(bars, [f"{n:,}" if n else "" for n in counts], fontsize=7.5, padding=2)
        below.set(xticks=range(len(counts)), yticks=[], xlabel=members)
        below.margins(y=0.15)
        below.spines["left"].set_visible(False)
    bar = figure.colorbar(image, ax=grid[0], shrink=0.8, aspect=20, pad=0.01)
    bar.outline.set_visible(False)
    bar.set_label("Jaccard index")
    grid[0, 0].set_ylabel("shared neurons\n(Jaccard)", color=style.INK, fontweight="bold")
    grid[1, 0].set_ylabel("neurons", color=style.INK, fontweight="bold")
    return figure


@style.styled
def accuracy(baseline: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the accuracy of each domain with its interval, and the accuracy of a guess.

    Args:
      baseline: {domain: {"accuracy", "low", "high", "chance", "n"}}; chance may be None.
    """
    hue = style.palette(list(baseline))
    figure = Figure(figsize=(11, 0.4 * len(baseline) + 0.75))
    ax = figure.subplots()
    for row, (domain, score) in enumerate(baseline.items()):
        ax.plot(
            [score["low"], score["high"]], [row, row], color=hue[domain], linewidth=5, alpha=0.3
        )
        ax.plot([score["accuracy"]], [row], "o", markersize=8, color=hue[domain])
        if score["chance"] is not None:
            ax.plot([score["chance"]] * 2, [row - 0.3, row + 0.3], color=style.GREY, linewidth=1.6)
        ax.text(
            1.02, row, f"{100 * score['accuracy']:.0f} %", transform=ax.get_yaxis_transform(),
            va="center", ha="left", color=style.darken(hue[domain]), fontweight="bold",
        )  # fmt: skip
        ax.text(
            1.08, row, f"n = {score['n']:,}", transform=ax.get_yaxis_transform(), va="center",
            color=style.GREY, fontsize=8,
        )  # fmt: skip
    first = next(iter(baseline.values()))
    if first["chance"] is not None:
        ax.text(
            first["chance"], -0.42, "chance", ha="center", va="bottom", color=style.GREY, fontsize=8
        )
    ax.set(xlim=(0, 1), ylim=(len(baseline) - 0.5, -0.75), xlabel="accuracy, 95 % interval")
    ax.set_yticks(range(len(baseline)), list(baseline))
    ax.tick_params(axis="y", length=0, labelcolor=style.INK, labelsize=9)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    return figure


def _separate(values: Sequence[float], gap: float) -> list[float]:
    """Return the positions nearest to the values at which neighbours are a gap apart."""
    order = np.argsort(values, kind="stable")
    offset = gap * np.arange(len(values))
    target = np.asarray(values, np.float64)[order] - offset
    # Pool neighbours that would overlap (isotonic regression), then add the gaps again.
    blocks: list[list[float]] = []
    for value in target:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    positions = np.empty(len(values))
    positions[order] = np.concatenate([[np.mean(b)] * len(b) for b in blocks]) + offset
    return positions.tolist()
