"""The style of all figures: colours, fonts and sizes."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import colors, patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


def halo() -> list:
    """Return the white outline of text on a picture."""
    return [patheffects.withStroke(linewidth=2.5, foreground="white")]


def darken(colour: str) -> np.ndarray:
    """The colour, dark enough to read as text on white."""
    return np.array(colors.to_rgb(colour)) * 0.78


def ink_on(colour) -> str:
    """Black or white, whichever reads better on the colour."""
    luminance = np.dot(colors.to_rgb(colour), [0.2126, 0.7152, 0.0722])
    return INK if luminance > 0.5 else "white"
