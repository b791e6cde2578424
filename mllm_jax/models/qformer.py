"""The Q-Former (Li et al. 2023): learned queries that attend to an image, next to a text.

A BERT of two branches (Dai et al. 2023): queries and text attend to one another and have separate
MLPs; in every second layer the queries also attend to the image. Only the states of the queries are
returned, so the MLP of the text in the last layer has no effect.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import attention, layers
from mllm_jax.sites import Site
from mllm_jax.sites import qformer as S
from mllm_jax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A Q-Former.

    Attributes:
      queries: The number of queries Q.
      vocab: The vocabulary size V of its text.
      positions: The largest number of tokens of its text.
      width: The width W.
      layers: The number of layers L.
      heads: The number of heads N.
      mlp: The number of neurons of an MLP, F.
      vision_width: The width E of the image features.
      look_every: The period of layers in which the queries attend to the image, from the first on.
      act: The activation of the MLPs.
      eps: The epsilon of the layer norms.
    """

    queries: int = 32
    vocab: int = 30523
    positions: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    vision_width: int = 1408
    look_every: int = 2
    act: str = "gelu"
    eps: float = 1e-12

    @classmethod
    def bert_base(cls) -> QFormerConfig:
        """Return the config of the Q-Former of Li et al. 2023, as large as BERT-base."""
        return cls()

    @classmethod
    def tiny(cls) -> QFormerConfig:
        """Return a config for tests."""
        return cls(
            queries=5, vocab=60, positions=40, width=24, layers=4, heads=4, mlp=40, vision_width=32
        )


class Attention(nnx.Module):
    """Attention to a source, with a residual connection and a norm after it."""

    def __init__(self, config: QFormerConfig, source_width: int, *, rngs: nnx.Rngs):
        W = config.width
        self.heads = config.heads
        self.q = layers.Linear(W, W, rngs=rngs)
        self.k = layers.Linear(source_width, W, rngs=rngs)
        self.v = layers.Linear(source_width, W, rngs=rngs)
        self.o = layers.Linear(W, W, rngs=rngs)
        self.norm = layers.LayerNorm(W, eps=config.eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "I T W"],
        source: Float[Array, "I S E"],
        mask: Bool[Array, "I 1 1 S"] | None = None,
        pattern: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "I T W"]:
        """Return the normalised states; `pattern` is applied to the probabilities [I, N, T, S]."""
        q, k, v = (
            f(a).reshape(*a.shape[:2], self.heads, -1)
            for f, a in ((self.q, x), (self.k, source), (self.v, source))
        )
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        heads = attention.attend(q, k, v, mask, pattern=pattern)
        return self.norm(x + self.o(heads.reshape(x.shape)))


class MLP(nnx.Module):
    """Two linear maps, with a residual connection and a norm after them."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        self.up = layers.Linear(config.width, config.mlp, rngs=rngs)
        self.down = layers.Linear(config.mlp, config.width, rngs=rngs)
        self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.act = config.act

    def __call__(self, x: Float[Array, "I T W"], site: Site, tap) -> Float[Array, "I T W"]:
        """Return the normalised states; the activation is tapped at `site`."""
        act = tap(site, layers.ACTIVATIONS[self.act](self.up(x)))
        return self.norm(x + self.down(act))


class Block(nnx.Module):
    """A layer for queries and text."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        self.queries = config.queries
        self.attn = Attention(config, config.width, rngs=rngs)
        self.query_mlp = MLP(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "I T W"], mask, look, tap) -> Float[Array, "I T W"]:
        """Return the states of queries, then text; `look` lets the queries attend to the image."""
        unread = tap.idle(S.attn.pattern, _pattern_shape(self.attn, x, x))
        pattern = None if unread else functools.partial(tap, S.attn.pattern)
        attended = self.attn(x, x, mask, pattern)
        queries, text = jnp.split(attended, [self.queries], 1)
        queries = self.query_mlp(look(queries), S.query_mlp.act, tap)
        text = self.mlp(text, S.mlp.act, tap)
        return tap(S.resid_post, jnp.concatenate([queries, text], 1))


def _pattern_shape(attn: Attention, x: Array, source: Array) -> jax.ShapeDtypeStruct:
    shape = x.shape[0], attn.heads, x.shape[1], source.shape[1]
    return jax.ShapeDtypeStruct(shape, jnp.promote_types(x.dtype, jnp.float32))


class QFormer(nnx.Module):
    """The network from image features to the states of Q queries.

    `look` stacks the cross-attention of the layers that have it. Without it all layers have equal
    shapes, so that one scan runs them and indexes `look` where needed.
    """

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        def normal(*shape):
            return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))

        self.config = config
        self.queries = normal(config.queries, config.width)
        self.words = normal(config.vocab, config.width)
        self.position = normal(config.positions, config.width)
        self.norm = layers.LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.layers = layers.stack(lambda keys: Block(config, rngs=keys), config.layers, rngs)
        self.look = layers.stack(
            lambda keys: Attention(config, config.vision_width, rngs=keys),
            -(-config.layers // config.look_every),
            rngs,
        )

    def __call__(
        self,
        features: Float[Array, "I P E"],
        ids: Int[Array, "I T"],
        valid: Bool[Array, "I T"],
        tap,
    ) -> Float[Array, "I Q W"]:
        """Return the states of the queries after the last layer.

        Args:
          features: The image features.
          ids: The tokens of the text of each image.
          valid: False for padding.
          tap: The taps of the Q-Former.
        """
        Q, every = self.config.queries, self.config.look_every
        features = features.astype(self.queries.dtype)
        place = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
        text = self.words[...][ids] + self.position[...][place]
        queries = jnp.broadcast_to(self.queries[...], (len(ids), *self.queries.shape))
        x = self.norm(jnp.concatenate([queries, text], 1))
        mask = jnp.pad(valid, ((0, 0), (Q, 0)), constant_values=True)[:, None, None, :]

        def step(layer, x, tap, number):
            looks = number % every == 0

            def look(queries, pattern=None):
                attend = jax.tree.map(lambda a: a[number // every], self.look)
                return attend(queries, features, pattern=pattern)

            def maybe(queries):
                shape = _pattern_shape(self.look, queries, features)
                if tap.idle(S.cross.pattern, shape):
                    return jax.lax.cond(looks, look, lambda same: same, queries)
                present = tap.when(looks)  # computed in every layer, as a condition lets no tap out
                return jnp.where(
                    looks,
                    look(queries, lambda p: present(S.cross.pattern, jnp.where(looks, p, 0))),
                    queries,
                )

            return layer(x, mask, maybe, tap), None

        x, _ = tap.scan(step, self.layers, x, jnp.arange(self.config.layers))
        return x[:, :Q]
