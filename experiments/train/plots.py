"""Figures of a training run."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.report import style


@style.styled
def loss_curve(curve: np.ndarray, right: float, wrong: float) -> Figure:
    """Draw the loss by step and its running mean, with the held-out losses.

    Args:
      curve: float[steps], the loss in nats per answer token.
      right: The held-out loss with the right pictures.
      wrong: The held-out loss with wrong pictures.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    steps = np.arange(1, len(curve) + 1)
    width = max(1, len(curve) // 40)
    kernel = np.ones(width) / width
    smooth = np.convolve(
        np.pad(curve, (width // 2, width - 1 - width // 2), "edge"), kernel, "valid"
    )
    ax.plot(steps, curve, alpha=0.25, linewidth=0.8, color="tab:blue")
    ax.plot(steps, smooth, color="tab:blue")
    for value, text in ((right, "held out"), (wrong, "held out, wrong picture")):
        ax.axhline(value, color="0.4", linestyle="--", linewidth=0.9)
        ax.annotate(
            f"{text}: {value:.2f}", (steps[-1], value), xytext=(0, 3),
            textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    ax.set(xlabel="step", ylabel="nats per answer token", ylim=(0, None))
    return figure
