"""Attribution to the patches of a picture.

Every patch has a gate: 1 keeps the patch, 0 replaces it by a baseline, the mean of the picture's
tokens at `lm.embed` and the mean colour of the training pictures at the pixels. The methods are
those for any gates:

    def word(out):                                  # a pure function of one pass: float[B]
        return out.logits[:, token]

    gated = GatedPicture.of(word, model, batch)     # at="lm.embed" or at="pixels"
    found = integrated_gradients(gated, steps=16)
    found.maps(row=0)                               # {tile: float32[rows, columns]}

`curves` tests an attribution: it returns the metric while patches are deleted or inserted,
strongest first and in random orders. Newline tokens, separators and the features that DeepStack
adds after `lm.embed` have no gate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.analysis import attribution, checks
from mllm_jax.batch import Batch
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.attention_maps import picture_maps
from mllm_jax.interventions.captures import Capture, keep
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.passes.arguments import as_partial
from mllm_jax.passes.run import Logits, Out, run
from mllm_jax.passes.sweep import sweep
from mllm_jax.tokens import TokenMap
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

At = Literal["lm.embed", "pixels"]
_LANES = 8  # pictures that are gated at their pixels at one time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedPicture:
    """A metric of a pass as a function of the gates of its patches; see `of`.

    The gates are float[n, P]: of the tokens of each row at `lm.embed`, of the patches of each tile
    at the pixels. Gates of entries that are not patches have no effect.

    Attributes:
      metric: A pure function of one pass that gives float[B], one value for each row.
      model: See `run`.
      batch: See `run`.
      edits: See `run`.
      captures: See `run`.
      baseline: The value of a closed token at `lm.embed`; None at the pixels, where it is 0.
      at: The place of the gates. Static.
      logits: See `run`. Static.
    """

    metric: jax.tree_util.Partial
    model: Model
    batch: Batch
    edits: Edits
    captures: dict[str, Capture]
    baseline: Float[AnyArray, "#B 1 D"] | None
    at: At = dataclasses.field(metadata={"static": True})
    logits: Logits = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        metric: Callable[[Out], Array],
        model: Model,
        batch: Batch,
        edits: Edits | None = None,
        captures: dict[str, Capture] | None = None,
        *,
        baseline: Float[AnyArray, " D"] | Float[AnyArray, "B 1 D"] | None = None,
        at: At = "lm.embed",
        logits: Logits = "last",
    ) -> GatedPicture:
        """Return the gated pictures of a batch.

        Args:
          metric: A pure function of one pass that gives float[B], one value for each row. Define it
            once, and give it the arrays that vary as `jax.tree_util.Partial(metric, ids=...)`.
          model: See `run`.
          batch: See `run`.
          edits: Edits of every pass.
          captures: The captures that the metric reads besides the logits.
          baseline: The value of a closed token at `lm.embed`, by default the mean of the image
            tokens of its row. A model with input norms is singular at 0: integrated gradients from
            zeros are far from complete there, whatever the number of steps.
          at: "lm.embed", where the LM reads image tokens, or "pixels".
          logits: See `run`.

        Raises:
          ValueError: `at` is unknown, or the batch has no pictures, or no pixels.
        """
        if at not in ("lm.embed", "pixels"):
            raise ValueError(f'at="{at}" is not one of lm.embed, pixels')
        if at == "pixels" and batch.features is not None:
            raise ValueError('at="pixels": the batch has vision features in place of its pixels')
        if at == "pixels" and baseline is not None:
            raise ValueError('at="pixels" takes no baseline: a closed patch is 0 there')
        batch = batch.replace(processor=None)
        if not (np.asarray(batch.tokens.kind) == tokens.CODE["image"]).any():
            raise ValueError("the batch has no picture whose patches could be gated")
        edits, captures = edits or Edits(), captures or {}
        if at == "lm.embed":
            mean = _mean_image_token(model, batch, edits) if baseline is None else baseline
            baseline = jnp.reshape(mean, (-1, 1, mean.shape[-1]))
        return cls(as_partial(metric), model, batch, edits, captures, baseline, at, logits)

    def __call__(self, gates: Float[Array, "n P"]) -> Float[Array, " B"]:
        """Return the metric with these gates."""
        batch, edits = self.batch, self.edits
        if self.at == "pixels":
            batch = self._with_gated_pixels(gates)
        else:
            edits = edits >> self.gating_edits(gates)
        values = self.metric(run(self.model, batch, edits, self.captures, logits=self.logits))
        return checks.one_a_row(values, len(self.batch.ids))

    def gating_edits(self, gates: Float[Array, "B T"]) -> Edits:
        """Return the edits that gate the tokens at `lm.embed`."""
        assert self.baseline is not None, "gates at lm.embed have one"
        return edits_.call(
            S.lm.embed, attribution.interpolate, where=tokens.image,
            gate=gates[..., None], closed=self.baseline,
        )  # fmt: skip

    @property
    def tokens(self) -> TokenMap:
        """The token map of the gates."""
        return self.model.token_maps(self.batch)["vision" if self.at == "pixels" else "lm"]

    @property
    def is_patch(self) -> Bool[Array, "n P"]:
        """Which gates are those of patches."""
        return self.tokens.kind == tokens.CODE["image"]

    @property
    def readers(self) -> Bool[np.ndarray, "B n"]:
        """Which rows of the batch each entry of the first axis of the gates belongs to."""
        readers = self.tokens.readers
        return np.eye(len(self.batch.ids), dtype=bool) if readers is None else np.asarray(readers)

    def _with_gated_pixels(self, gates: Float[Array, "I P"]) -> Batch:
        pixels = jnp.asarray(self.batch.pixels)
        gates = jnp.where(self.is_patch, gates, 1)
        if self.batch.grid is not None:
            return self.batch.replace(pixels=pixels * gates[..., None])
        side = math.isqrt(gates.shape[1])  # tiles are squares, and CLS comes before the patches
        size = pixels.shape[1] // side
        grid = gates[:, gates.shape[1] - side**2 :].reshape(-1, side, side)
        full = jnp.repeat(jnp.repeat(grid, size, 1), size, 2)
        rest = pixels.shape[1] - side * size  # pixels that the tower does not read
        full = jnp.pad(full, ((0, 0), (0, rest), (0, rest)), constant_values=1)
        return self.batch.replace(pixels=pixels * full[..., None])


def _mean_image_token(model: Model, batch: Batch, edits: Edits) -> Float[Array, "B 1 D"]:
    """Return the mean of the image tokens of each row, 0 where there are none."""
    embed = keep(S.lm.embed, where=tokens.image)
    tokens_of_images = run(model, batch, edits, {"embed": embed}, logits="none")["embed"]
    count = tokens.image.mask(batch.tokens).sum(1)[:, None, None]
    return tokens_of_images.sum(1, keepdims=True) / np.maximum(count, 1)


@dataclasses.dataclass(frozen=True)
class PatchAttribution:
    """What each patch contributes to a metric.

    Attributes:
      values: In the units of the metric, float32[n, P], 0 where there is no patch.
      metric: The metric of each row with all patches, float32[B].
      tokens: The token map of the values.
      readers: Which rows each entry of the first axis of the values belongs to, bool[B, n].
    """

    values: Float[np.ndarray, "n P"]
    metric: Float[np.ndarray, " B"]
    tokens: TokenMap
    readers: Bool[np.ndarray, "B n"]

    def maps(self, row: int) -> dict[int, Float[np.ndarray, "rows columns"]]:
        """Return the values of a row's pictures on their grids, by tile; NaN where there is none.

        A tile that several rows read has the sum of its contributions to them.
        """
        maps: dict[int, np.ndarray] = {}
        for entry in np.flatnonzero(self.readers[row]).tolist():
            maps |= picture_maps(self.values[entry], self.tokens, entry)
        return maps


@dataclasses.dataclass(frozen=True)
class Curves:
    """The metric of each row while patches are deleted from a picture or inserted into it.

    Petsiuk et al. 2018, "RISE". For a faithful attribution, deletion is below that of random orders
    and insertion above.

    Attributes:
      share: The share of the patches that is deleted or inserted, float[steps + 1], from 0 to 1.
      deletion: The metric, strongest patches deleted first, float[B, steps + 1].
      insertion: The metric, strongest patches inserted first, float[B, steps + 1].
      random_deletion: The metric in random orders, float[draws, B, steps + 1].
      random_insertion: The metric in random orders, float[draws, B, steps + 1].
    """

    share: Float[np.ndarray, " steps"]
    deletion: Float[np.ndarray, "B steps"]
    insertion: Float[np.ndarray, "B steps"]
    random_deletion: Float[np.ndarray, "draws B steps"]
    random_insertion: Float[np.ndarray, "draws B steps"]

    def area(self, curve: Float[np.ndarray, "... steps"]) -> Float[np.ndarray, ...]:
        """Return the area under a curve, the mean of the metric over the shares."""
        return np.trapezoid(curve, self.share, axis=-1)


def gradient_times_input(gated: GatedPicture) -> PatchAttribution:
    """Return gradient x input: the effect of closing each gate alone, to first order.

    It sums the product over the width of a token, or over the pixels of a patch.
    """
    return _finished(gated, *_first_order(gated))


def integrated_gradients(gated: GatedPicture, *, steps: int = 16) -> PatchAttribution:
    """Return integrated gradients, from all gates closed to all open.

    The values of a row's patches sum to its metric with all patches minus that with none, up to the
    error of the midpoint rule.

    Args:
      gated: The metric.
      steps: The number of gradients that are averaged.
    """
    return _finished(gated, *_integrated(gated, steps))


def occlusion(gated: GatedPicture, *, window: int = 1) -> PatchAttribution:
    """Return the decrease of the metric when a window around each patch is closed.

    At `lm.embed` it is a sweep, which computes the layers below once.

    Args:
      gated: The metric.
      window: The side of the window in patches, odd; at the border of a tile it is cut off.

    Raises:
      ValueError: The window is even or below 1.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: a window around a patch has an odd side, such as 3")
    number, lanes = _number_patches(gated)
    closed = _closed_windows(gated, number, lanes, window // 2)
    open_ = np.ones((1, *number.shape), bool)
    metric = evaluate(gated, np.concatenate([open_, ~closed]))
    falls = (metric[:1] - metric[1:]) @ gated.readers.astype(metric.dtype)  # [lanes, n]
    entry = np.arange(len(number))[:, None]
    values = np.where(number >= 0, falls[number, entry], 0)
    return _finished(gated, values, metric[0])


def curves(
    gated: GatedPicture,
    values: Float[np.ndarray, "n P"],
    *,
    steps: int = 10,
    draws: int = 5,
    seed: int = 0,
) -> Curves:
    """Return deletion and insertion curves of an attribution, beside those of random orders.

    Args:
      gated: The metric.
      values: `PatchAttribution.values`, or other numbers that rank the patches.
      steps: The number of parts into which the patches of a picture are divided.
      draws: The number of random orders.
      seed: The seed of the random orders.
    """
    if steps < 1 or draws < 0:
        raise ValueError(f"steps={steps} must be 1 or more, and draws={draws} 0 or more")
    rng = np.random.default_rng(seed)
    rankings = [checks.finite(values, "values"), *(rng.random(values.shape) for _ in range(draws))]
    ranks, counts = zip(*(_rank_patches(gated, ranking) for ranking in rankings), strict=True)
    step = np.arange(steps + 1)[:, None, None]
    chosen = np.stack(ranks)[:, None] * steps < step * np.stack(counts)[:, None]
    lanes = np.stack([~chosen, chosen])  # [2, 1 + draws, steps + 1, n, P]
    metric = evaluate(gated, lanes.reshape(-1, *values.shape))
    deletion, insertion = np.moveaxis(metric.reshape(*lanes.shape[:3], -1), -1, -2)
    share = np.linspace(0, 1, steps + 1)
    return Curves(share, deletion[0], insertion[0], deletion[1:], insertion[1:])


def evaluate(gated: GatedPicture, gates: Float[np.ndarray, "R n P"]) -> Float[np.ndarray, "R B"]:
    """Return the metric with each of several gates.

    Args:
      gated: The metric.
      gates: Numbers from 0 to 1, or bool.
    """
    gates = np.asarray(gates, np.float32)
    if gated.at == "lm.embed":
        lanes = [gated.edits >> gated.gating_edits(lane) for lane in gates]
        metric = sweep(
            gated.metric, gated.model, gated.batch, lanes, gated.captures or None,
            logits=gated.logits, label="gates",
        )  # fmt: skip
        checks.one_a_row(metric[0], len(gated.batch.ids))
    else:
        chunks = [
            np.arange(start, start + _LANES) % len(gates)  # one length, so one program
            for start in range(0, len(gates), _LANES)
        ]
        bar = tqdm.tqdm(chunks, desc="gates", leave=False)
        metric = np.concatenate([_evaluate(gated, gates[chunk]) for chunk in bar])[: len(gates)]
    return checks.finite(metric, "the metric")


@jax.jit
def _evaluate(gated: GatedPicture, gates: Float[Array, "R n P"]) -> Float[Array, "R B"]:
    return jax.vmap(gated)(gates)


@jax.jit
def _first_order(gated: GatedPicture) -> tuple[Array, Array]:
    gates = jnp.ones(gated.is_patch.shape, jnp.float32)
    values, _ = attribution.first_order(lambda gates: gated(gates).sum(), gates)
    return values, gated(gates)


@functools.partial(jax.jit, static_argnames="steps")
def _integrated(gated: GatedPicture, steps: int) -> tuple[Array, Array]:
    gates = jnp.ones(gated.is_patch.shape, jnp.float32)
    values, _ = attribution.integrated(lambda gates: gated(gates).sum(), gates, steps=steps)
    return values, gated(gates)


def _finished(gated: GatedPicture, values: Any, metric: Any) -> PatchAttribution:
    values = checks.finite(values, "the attribution").astype(np.float32)
    metric = checks.finite(metric, "the metric")
    return PatchAttribution(values, metric, gated.tokens, gated.readers)


def _pictures(gated: GatedPicture) -> Int[np.ndarray, " n"]:
    """Return the first row that each entry of the first axis belongs to."""
    return gated.readers.argmax(0)


def _number_patches(gated: GatedPicture) -> tuple[Int[np.ndarray, "n P"], int]:
    """Return the number of each patch in its row's pictures, or -1, and the largest row's count.

    Rows do not depend on each other, so that one lane closes a patch in each.
    """
    is_patch, row = np.asarray(gated.is_patch), _pictures(gated)
    number = np.full(is_patch.shape, -1)
    for own in np.unique(row):
        at = is_patch & (row == own)[:, None]
        number[at] = np.arange(at.sum())
    return number, int(number.max()) + 1


def _closed_windows(
    gated: GatedPicture, number: Int[np.ndarray, "n P"], lanes: int, reach: int
) -> Bool[np.ndarray, "R n P"]:
    """Return the gates that each lane closes: windows of this reach around one patch per row."""
    closed = number == np.arange(lanes)[:, None, None]
    if not reach:
        return closed
    map_, row = jax.tree.map(np.asarray, gated.tokens), _pictures(gated)
    is_patch = number >= 0
    for lane, entry, at in np.argwhere(closed.copy()).tolist():
        near = is_patch & (row == row[entry])[:, None] & (map_.tile == map_.tile[entry, at])
        for name in ("row", "column"):
            place = getattr(map_, name).astype(int)
            near &= (place >= 0) & (abs(place - place[entry, at]) <= reach)
        closed[lane] |= near
    return closed


def _rank_patches(
    gated: GatedPicture, values: Float[np.ndarray, "n P"]
) -> tuple[Int[np.ndarray, "n P"], Int[np.ndarray, "n P"]]:
    """Return the rank of each patch in its row, strongest first, and how many patches the row has.

    Equal values are in the order of the patches. Where there is no patch, the count is 0.
    """
    is_patch, row = np.asarray(gated.is_patch), _pictures(gated)
    ranks, counts = np.zeros((2, *values.shape), int)
    for own in np.unique(row):
        at = np.nonzero(is_patch & (row == own)[:, None])
        order = np.argsort(-values[at], kind="stable")
        ranks[at[0][order], at[1][order]] = np.arange(len(order))
        counts[at] = len(order)
    return ranks, counts
