"""Figures of the stages of the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm_jax.report import figures, style


@style.styled
def entropy_curves(
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    overall: Mapping[str, Any] | None = None,
    staged_kind: str = "image",
) -> Figure:
    """Draw the entropy of the logit lens by layer, with one panel per kind of token.

    Args:
      curves: {domain: {kind: {"mean", "low", "high": float[L]}}}, in nats.
      stages: {domain: {"boundaries", "low", "high"}}; boundaries are None if undecided.
      overall: The same for all domains together.
      staged_kind: The kind of token whose curves have these stages.
    """
    kinds = list(dict.fromkeys(kind for by_kind in curves.values() for kind in by_kind))
    hue = style.palette(list(curves))
    strip = 0.15 * len(curves) + 0.9 if stages else 0
    figure = Figure(figsize=(11, 4.2 + strip))
    grid = figure.subplots(
        2, len(kinds), squeeze=False, sharex=True, height_ratios=[4.2, max(strip, 1e-3)]
    )
    above, below = grid
    for ax in above[1:]:
        ax.sharey(above[0])
    for ax, kind in zip(above, kinds, strict=True):
        figures.draw_curves(
            ax, {d: by_kind[kind] for d, by_kind in curves.items() if kind in by_kind}, hue
        )
        ax.set_title(f"{kind} tokens")
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("layer")
    above[0].set_ylabel("entropy of the lens, nats")
    for ax, kind in zip(above, kinds, strict=True):  # needs the final shared scale
        figures.label_ends(
            ax, {d: by_kind[kind] for d, by_kind in curves.items() if kind in by_kind}, hue
        )
    for ax, lower, kind in zip(above, below, kinds, strict=True):
        staged = kind == staged_kind
        if staged and overall:
            draw_stages(ax, overall)
        if staged and stages:
            _stage_strip(lower, stages, hue)
        else:
            lower.set_axis_off()
    return figure


STAGE_NAMES = ("alignment", "processing", "token selection")


def draw_stages(ax: Axes, stage: Mapping[str, Any]) -> None:
    """Draw the boundaries of stages with their intervals.

    Segments have the names of the stages only if they have the claimed pattern.
    """
    if stage["boundaries"] is None:
        ax.text(
            0.02, 0.98, "stages undecided", transform=ax.transAxes, ha="left", va="top",
            color=style.GREY, fontsize=8.5, style="italic",
        )  # fmt: skip
        return
    last = float(np.asarray(ax.get_lines()[0].get_xdata())[-1])
    for boundary, low, high in zip(stage["boundaries"], stage["low"], stage["high"], strict=True):
        ax.axvspan(low - 0.5, high - 0.5, color=style.INK, alpha=0.07, linewidth=0)
        ax.axvline(boundary - 0.5, color=style.INK, linewidth=0.9, linestyle=(0, (4, 2)))
    if not stage["claimed"]:
        return
    edges = [0, *(b - 0.5 for b in stage["boundaries"]), last]
    for name, left, right in zip(STAGE_NAMES, edges, edges[1:], strict=False):
        is_narrow = (
            name == STAGE_NAMES[1] and right - left < last / 4
        )  # put its name one line lower
        ax.text(
            (left + right) / 2, 0.93 if is_narrow else 0.985, name,
            transform=ax.get_xaxis_transform(), ha="center", va="top", color=style.GREY, fontsize=8,
            style="italic", path_effects=style.halo(),
        )  # fmt: skip


def _stage_strip(ax: Axes, stages: Mapping[str, Mapping[str, Any]], hue: Mapping[str, str]) -> None:
    """Draw the boundaries of each domain and their intervals."""
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
            1.025, row, name if decided else f"{name}: undecided", color=style.darken(hue[name]),
            transform=ax.get_yaxis_transform(), va="center", fontsize=7.5,
        )  # fmt: skip
    ax.set(ylim=(len(stages) - 0.4, -0.6), yticks=[])
    ax.set_title("stage boundaries with 95 % intervals", fontsize=8.5, fontweight="normal", pad=3)
    ax.tick_params(labelbottom=True, length=0)
    ax.set_xlabel("layer")
    ax.grid(axis="x")
    ax.spines[:].set_visible(False)
