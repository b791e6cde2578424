"""Jacobian lens: the logit lens after the average Jacobian from a layer's states to the last ones.

The lens of a layer is head(J h), where J is the mean derivative of the last residual with respect
to the layer's residual: to first order, what the state makes the model say (Gurnee, Sofroniew,
Lindsey et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models";
reference code anthropics/jacobian-lens). As there, the derivatives of all later selected tokens
with respect to a selected token are summed, so that one backward pass computes one row of J for
every layer, and averaged over the selected tokens of a row and then over rows. Nothing is trained.

    lens = jacobian_lens.fit(model, batches, [5, 15, 29], where=tok.image | tok.question)
    lenses.compare(model, states, lens).kl                       # states [n, L, D] of these layers
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.interventions import captures
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.passes.run import run
from mllm_jax.tokens import Selector, Where
from mllm_jax.training.lenses import AffineLens, require_layers
from mllm_jax.typing import Array, Bool, Float, Int

# The number of tokens whose derivatives are computed at a time, over all rows of the Jacobians:
# more would take more memory without being faster.
CHUNK_TOKENS = 2048


class Jacobians(NamedTuple):
    """The Jacobians of some rows, summed over these rows.

    Attributes:
      values: d last residual / d residual of each layer but the last, float32[L - 1, D, D]; entry
        [i, j] is the derivative of unit i of the last residual with respect to unit j.
      rows: The number of rows.
    """

    values: Float[np.ndarray, "L_1 D D"]
    rows: int


def fit(
    model: Model,
    batches: Iterable[Batch],
    layers: Sequence[int] | None = None,
    *,
    where: Selector = None,
    edits: Edits | None = None,
) -> AffineLens:
    """Compute the Jacobian lens of some layers; see `jacobians` and `mean`."""
    return mean(jacobians(model, batch, layers, where=where, edits=edits) for batch in batches)


def mean(parts: Iterable[Jacobians]) -> AffineLens:
    """Return the lens of the mean Jacobian of all rows.

    Args:
      parts: The Jacobians of each batch.

    Raises:
      ValueError: There is no batch.
    """
    total, rows = None, 0
    for values, count in parts:
        total = values.astype(np.float32) if total is None else total + values
        rows += count
    if total is None:
        raise ValueError("there is no batch to compute Jacobians on")
    weight = (total / rows).swapaxes(1, 2) - np.eye(total.shape[-1], dtype=np.float32)
    return AffineLens(weight, np.zeros(weight.shape[:2], np.float32))


def jacobians(
    model: Model,
    batch: Batch,
    layers: Sequence[int] | None = None,
    *,
    where: Selector = None,
    edits: Edits | None = None,
) -> Jacobians:
    """Compute the Jacobians from the residual after some layers to the last one, of one batch.

    It takes one forward pass, and D backward passes through the language model, several at a time.

    Args:
      model: The model.
      batch: The batch. With features of its pictures the vision tower is not run.
      layers: The layers of the lens, of which the last is the model's last; all by default.
      where: The tokens between which derivatives are taken; all by default. It is best to leave out
        the first token of a row, to which all others attend.
      edits: Edits of the pass.

    Raises:
      ValueError: The layers do not end with the model's last, or `where` selects nothing.
    """
    batch = batch.replace(processor=None)
    count = look_up(S.lm.resid_post, site_shapes(model, batch)).layers
    given = range(count) if layers is None else layers
    from_first = [layer + count if layer < 0 else layer for layer in given]
    chosen = require_layers("layers", from_first, count)
    mask = np.asarray(tokens.of(where).mask(model.token_maps(batch)["lm"]))
    if not mask.any():
        raise ValueError("where= selects no token of this batch")
    chunk = max(1, CHUNK_TOKENS // mask.size)
    sums = _sums(model, batch, edits or Edits(), mask, np.array(chosen[:-1]), chunk=chunk)
    return Jacobians(np.asarray(sums), int(mask.any(-1).sum()))


@functools.partial(jax.jit, static_argnames=("chunk",))
def _sums(
    model: Model,
    batch: Batch,
    edits: Edits,
    mask: Bool[Array, "B T"],
    layers: Int[Array, " L_1"],
    *,
    chunk: int,
) -> Float[Array, "L_1 D D"]:
    """Return the sum over rows of the mean over source tokens of the sum over target tokens."""
    shape = look_up(S.lm.resid_post, site_shapes(model, batch))
    last, where = captures.keep(S.lm.resid_post[-1]), Where("mask", value=mask)

    def states(shift: Float[Array, "L D"]) -> Float[Array, "B T D"]:
        moved = edits >> edits_.add(S.lm.resid_post, shift, where=where)
        return run(model, batch, moved, {"last": last}, logits="none")["last"]

    # All source tokens share a shift, so its gradient is the sum over them.
    found, pull_back = jax.vjp(states, jnp.zeros((shape.layers, shape.shape[-1]), shape.dtype))
    share = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)

    def row(unit: Int[Array, ""]) -> Float[Array, "L_1 D"]:
        target = jax.nn.one_hot(unit, found.shape[-1], dtype=found.dtype)
        (gradient,) = pull_back(
            (share[..., None] * target).astype(found.dtype).reshape(found.shape)
        )
        return gradient[layers].astype(jnp.float32)

    rows = jax.lax.map(row, jnp.arange(found.shape[-1]), batch_size=chunk)
    return rows.swapaxes(0, 1)
