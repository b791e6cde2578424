"""The style of all figures: colours, fonts and sizes."""

from __future__ import annotations

import functools
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib import colors, patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine

from mllm_jax import store

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
INK, GREY, FAINT = "#222222", "#7A7A7A", "#E4E4E4"
STYLE: dict[Any, Any] = {  # matplotlib types its keys as literals
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
    "svg.fonttype": "none",  # text stays text, to search and to edit
    "svg.hashsalt": "mllm_jax",  # the same figure has the same bytes
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
}


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Write a figure as .png or .svg, atomically and without a date."""
    image, form = io.BytesIO(), pathlib.Path(path).suffix[1:]
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[form]
    with matplotlib.rc_context(STYLE):
        _lay_out(figure)
        figure.savefig(image, format=form, metadata=metadata)
    store.write(path, image.getvalue())


def _lay_out(figure: Figure) -> None:
    """Lay out a figure once, at rounded positions.

    The last digits of constrained layout vary from call to call, and ids in an SVG are hashes of
    them.
    """
    engine = figure.get_layout_engine()
    if engine is None or isinstance(engine, PlaceHolderLayoutEngine):
        return
    engine.execute(figure)
    figure.set_layout_engine("none")
    for ax in figure.axes:
        ax.set_position(np.round(ax.get_position(original=True).bounds, 9))


P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw in the common style, on its own canvas and without global state."""

    @functools.wraps(draw)
    def draw_styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure)
            return figure

    return draw_styled


def palette(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name: those of PALETTE, or of viridis for more names than it has."""
    if len(names) > len(PALETTE):
        gradient = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
        return {name: colors.to_hex(c) for name, c in zip(names, gradient, strict=True)}
    return dict(zip(names, PALETTE, strict=False))


def halo() -> list[patheffects.AbstractPathEffect]:
    """Return the white outline of text on an image."""
    return [patheffects.withStroke(linewidth=2.5, foreground="white")]


def darken(colour: str) -> np.ndarray:
    """Return a colour that is dark enough for text on white."""
    return np.array(colors.to_rgb(colour)) * 0.78


def text_colour_on(background: Any) -> str:
    """Return black or white, whichever has the higher contrast on a background colour."""
    luminance = np.dot(colors.to_rgb(background), [0.2126, 0.7152, 0.0722])
    return INK if luminance > 0.5 else "white"
