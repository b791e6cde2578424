"""Direct logit attribution: what each part of the model adds to a logit, or to a difference of two.

The last state is the sum of the embedding and of the outputs of all attentions and MLPs, and a
logit is the product of the normalised state with a row of the head. With the factor of the final
norm folded in, a logit is therefore a sum over layers, heads, MLPs, and the tokens that heads read:

    found = direct_logits.attribute(model, batch, right, wrong)
    found.heads                                  # float32[L, B, N]
    found.by_token                               # float32[L, B, N, S]
    found.total, found.logits                    # equal up to rounding

Only direct effects count: what a part changes through later layers is attributed to these layers
(Elhage et al. 2021, "A mathematical framework for transformer circuits"). The sum is the logit
before a soft cap (Gemma 2). Norms after attention (Gemma 2 and 3) are folded in like the final one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import Capture, attention, keep, mean
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.numerics import precision
from mllm_jax.passes import arguments
from mllm_jax.passes.run import check_logits, run
from mllm_jax.typing import Array, ArrayLike, Float, Int

CAPTURES: dict[str, Capture] = {
    "embed": mean(S.lm.embed, where=tokens.last),
    "attn_out": mean(S.lm.attn_out, where=tokens.last),
    "heads": mean(S.lm.attn.heads, where=tokens.last),
    "pattern": attention(S.lm.attn.pattern, where=tokens.last),
    "v": keep(S.lm.attn.v),
    "mlp_out": mean(S.lm.mlp.out, where=tokens.last),
    "resid": mean(S.lm.resid_post[-1], where=tokens.last),
    "norm": mean(S.lm.norm, where=tokens.last),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DirectLogits:
    """What each part of the model adds to the logit of each row, at its last token.

    Attributes:
      embed: The term of the embedding of the last token, float32[B].
      attention: The term of attention in each layer, float32[L, B].
      mlp: The term of the MLP in each layer, float32[L, B].
      heads: The term of each head, float32[L, B, N]. They sum to `attention`, except for the bias
        of the output projection, if it has one.
      by_token: The term of each token that a head reads, float32[L, B, N, S]. They sum to `heads`,
        except for heads that an edit changes directly.
      logits: The logit before a soft cap, or the difference of two, float32[B].
    """

    embed: Float[Array, " B"]
    attention: Float[Array, "L B"]
    mlp: Float[Array, "L B"]
    heads: Float[Array, "L B N"]
    by_token: Float[Array, "L B N S"]
    logits: Float[Array, " B"]

    @property
    def total(self) -> Float[Array, " B"]:
        """The sum of all parts; `logits`, unless an edit changed the residual itself."""
        return self.embed + self.attention.sum(0) + self.mlp.sum(0)


def attribute(
    model: Model,
    batch: Batch,
    right: ArrayLike,
    wrong: ArrayLike | None = None,
    edits: Edits | None = None,
) -> DirectLogits:
    """Attribute the logit of a word after each row, or its difference from that of another word.

    Args:
      model: See `run`.
      batch: See `run`.
      right: The word, int32[] or int32[B].
      wrong: The word whose logit is subtracted, likewise; None for none.
      edits: Edits of the pass.
    """
    arguments.check(model, batch)
    check_logits("last", batch)
    out = run(model, batch, edits, CAPTURES, logits="none")
    return decompose(model, out.captures, right, wrong)


def decompose(
    model: Model, captured: dict[str, Array], right: ArrayLike, wrong: ArrayLike | None = None
) -> DirectLogits:
    """Attribute the logits of a pass that captured `CAPTURES`.

    Args:
      model: The model of the pass.
      captured: The captures, by the names of `CAPTURES`.
      right: See `attribute`.
      wrong: See `attribute`.

    Raises:
      ValueError: A word is not in the vocabulary.
    """
    rows, vocab = captured["resid"].shape[0], model.config.lm.vocab
    words = [word for word in (right, wrong) if word is not None]
    for word in words:
        if not isinstance(word, jax.core.Tracer) and not np.isin(word, np.arange(vocab)).all():
            raise ValueError(
                f"the words {word} are not all ids of the vocabulary, 0 to {vocab - 1}"
            )
    ids = jnp.stack([jnp.broadcast_to(jnp.asarray(word), (rows,)) for word in words])
    return _decompose(model, {name: captured[name] for name in CAPTURES}, ids)


@jax.jit
def _decompose(model: Model, captured: dict[str, Array], ids: Int[Array, "n B"]) -> DirectLogits:
    lm, product = model.lm, functools.partial(precision.einsum, into_float32=True)
    rows = precision.at_least_float32(lm.unembedding(ids))
    row = rows[0] - rows[1] if len(rows) > 1 else rows[0]
    direction = row * lm.norm.factor(captured["resid"])

    def by_head(inputs):
        layer, heads, pattern, v = inputs
        reads = jax.grad(lambda heads: product("BND,BD->", layer.split_by_head(heads), direction))(
            heads
        )
        group = reads.reshape(*v.shape[::2], -1, v.shape[-1])  # [B, K, N / K, H]
        read = product("BSKH,BKGH->BKGS", precision.at_least_float32(v), group)
        return (reads * heads).sum(-1), pattern * read.reshape(pattern.shape)

    each = lm.layers, captured["heads"], captured["pattern"], captured["v"]
    heads, by_token = jax.lax.map(by_head, each)
    return DirectLogits(
        embed=product("BD,BD->B", captured["embed"], direction),
        attention=product("LBD,BD->LB", captured["attn_out"], direction),
        mlp=product("LBD,BD->LB", captured["mlp_out"], direction),
        heads=heads,
        by_token=by_token,
        logits=product("BD,BD->B", captured["norm"], row),
    )
