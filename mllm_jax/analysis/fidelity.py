"""How faithfully a dictionary reconstructs activations, without running a model.

    held_out = mj.collect({"image": mj.keep(site, where=tok.image)}, model, batches, path)["image"]
    measured = fidelity.measure(dictionary, (v.value for v in held_out.shuffled(1024, seed=0)))
    measured.explained, measured.active_per_token, measured.dead

`loss_recovered` measures what the model loses when the reconstruction replaces the activations,
from losses with a splice, with an ablation, and with neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np

from mllm_jax.analysis import checks, intervals
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.numerics import precision
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How a dictionary reconstructs some tokens.

    Attributes:
      tokens: The number of tokens.
      active: The number of tokens on which each latent is active, int64[M].
      error: The mean squared distance of a reconstruction from its vector.
      variance: The mean squared distance of a vector from the mean vector.
    """

    tokens: int
    active: Int[np.ndarray, " M"]
    error: float
    variance: float

    @property
    def explained(self) -> float:
        """The share of the variance that is reconstructed; NaN where there is none."""
        return 1 - self.error / self.variance if self.variance > 0 else float("nan")

    @property
    def active_per_token(self) -> float:
        """The mean number of active latents of a token, L0."""
        return float(self.active.sum() / self.tokens)

    @property
    def dead(self) -> float:
        """The share of latents that are active on no token."""
        return float((self.active == 0).mean())


def measure(dictionary: Dictionary, vectors: Iterable[Float[AnyArray, "n D"]]) -> Fidelity:
    """Measure how an autoencoder reconstructs vectors.

    Args:
      dictionary: An autoencoder, not a transcoder.
      vectors: The vectors, in chunks. Sums are in float64.

    Raises:
      ValueError: There is no vector, some are not [n, D], or the dictionary is a transcoder.
    """
    D, M, E = dictionary.widths
    if D != E or dictionary.skip is not None:
        what = "has a skip map" if D == E else f"reads vectors of {D} and returns {E}"
        raise ValueError(f"this dictionary {what}: it is a transcoder, not an autoencoder")
    tokens, error, square = 0, 0.0, 0.0
    active, total = np.zeros(M, np.int64), np.zeros(D, np.float64)
    for some in vectors:
        wide = np.asarray(some, np.float64)
        if wide.ndim != 2 or wide.shape[1] != D:
            raise ValueError(f"vectors are {list(wide.shape)}, expected [n, {D}]")
        distance, is_active = jax.device_get(_reconstruct(dictionary, np.asarray(some)))
        tokens += len(wide)
        error += float(distance.sum(dtype=np.float64))
        active += is_active.sum(0, dtype=np.int64)
        total += wide.sum(0)
        square += float((wide**2).sum())
    if not tokens:
        raise ValueError("there is no vector to measure a dictionary on")
    variance = max(0.0, (square - float((total**2).sum()) / tokens) / tokens)
    return Fidelity(tokens, active, error / tokens, variance)


@jax.jit
def _reconstruct(
    dictionary: Dictionary, x: Float[Array, "n D"]
) -> tuple[Float[Array, " n"], Bool[Array, "n M"]]:
    """Return the squared distance of each reconstruction, and the active latents."""
    x = precision.at_least_float32(x)
    latents = dictionary.encode(x)
    return ((x - dictionary.decode(latents, x)) ** 2).sum(-1), latents > 0


def loss_recovered(
    clean: Float[AnyArray, " N"], ablated: Float[AnyArray, " N"], spliced: Float[AnyArray, " N"]
) -> intervals.Interval[float]:
    """Return the share of an ablation's damage that a dictionary avoids, with its interval.

    It is 1 if the splice costs nothing, 0 if it costs as much as the ablation, and below 0 if it
    costs more.

    Args:
      clean: The loss of each example without edits.
      ablated: The loss of each example with the site set to zero or to its mean.
      spliced: The loss of each example with the site replaced by its reconstruction.

    Returns:
      The share of mean losses, and its 95 % bootstrap interval over examples; NaN if the ablation
      does no damage on average, and the same for the ends of the interval.

    Raises:
      ValueError: The losses are not of the same examples, or not finite.
    """
    named = {"clean": clean, "ablated": ablated, "spliced": spliced}
    losses = {name: np.asarray(values, np.float64) for name, values in named.items()}
    shapes = {values.shape for values in losses.values()}
    if len(shapes) > 1 or losses["clean"].ndim != 1 or not losses["clean"].size:
        raise ValueError(
            "losses must be one per example, of the same examples, got shapes "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    for name, values in losses.items():
        checks.finite(values, name)
    saved, damage = losses["ablated"] - losses["spliced"], losses["ablated"] - losses["clean"]
    drawn = intervals.draws(len(damage)) / len(damage)
    value = _share(saved.mean(), damage.mean())
    samples = _share((drawn * saved).sum(1), (drawn * damage).sum(1))
    if np.isnan(value) or np.isnan(samples).any():
        return intervals.Interval(float(value), float("nan"), float("nan"))
    low, high = intervals.percentiles(samples)
    return intervals.Interval(float(value), float(low), float(high))


def _share(saved: Float[AnyArray, ...], damage: Float[AnyArray, ...]) -> Float[np.ndarray, ...]:
    """Return saved / damage, NaN where there is no damage."""
    saved, damage = np.asarray(saved), np.asarray(damage)
    return np.divide(saved, damage, out=np.full(damage.shape, np.nan), where=damage > 0)
