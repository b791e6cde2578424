"""The pre-norm transformer block of all vision towers, and the attention and MLP in it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import attention, layers, rotary
from mllm_jax.sites import vision as S
from mllm_jax.typing import Array, Bool, Float

Norm = Literal["layer", "rms"]
_QK_EPS = 1e-6  # of the norms of queries and keys, whatever the checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A block of a vision tower.

    Attributes:
      width: The width E.
      heads: The number of heads N.
      mlp: The number of neurons of an MLP, F.
      act: The activation of the MLP.
      eps: The epsilon of the norms.
      norm: Layer norms or RMS norms.
      qkv_bias: Whether the maps to queries, keys and values have a bias.
      out_bias: Whether the output map of attention has a bias.
      mlp_bias: Whether the maps of the MLP have a bias.
      gated: Whether the MLP is down(act(gate(x)) * up(x)) instead of down(act(up(x))).
      qk_norm: Whether queries and keys have an RMS norm, over the width of all heads.
      layer_scale: Whether each output is multiplied by a vector before it is added.
    """

    width: int
    heads: int
    mlp: int
    act: str
    eps: float
    norm: Norm = "layer"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    qk_norm: bool = False
    layer_scale: bool = False


def layers_below(feature_layer: int | None, layers: int) -> int:
    """Return the number of blocks below a hidden state.

    Args:
      feature_layer: The hidden state, counted as in HF: 0 is the embedding, -1 the last layer;
        None for the last layer.
      layers: The number of blocks of the tower.
    """
    at = -1 if feature_layer is None else feature_layer
    return at if at >= 0 else layers + 1 + at


def make_norm(
    kind: Norm, width: int, *, eps: float, rngs: nnx.Rngs
) -> layers.LayerNorm | layers.RMSNorm:
    """Return a norm of this kind."""
    norm = layers.LayerNorm if kind == "layer" else layers.RMSNorm
    return norm(width, eps=eps, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        E = config.width
        self.heads = config.heads
        self.q, self.k, self.v = (
            layers.Linear(E, E, use_bias=config.qkv_bias, rngs=rngs) for _ in range(3)
        )
        self.o = layers.Linear(E, E, use_bias=config.out_bias, rngs=rngs)
        self.has_qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (layers.RMSNorm(E, eps=_QK_EPS, rngs=rngs) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "I P E"],
        tap,
        mask: Bool[Array, "I 1 #P P"] | None = None,
        rope: rotary.Rotation | None = None,
    ) -> Float[Array, "I P E"]:
        """Return the output of the heads; see `Block`."""
        I, P, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.reshape(I, P, self.heads, -1) for part in (q, k, v))
        if rope is not None:
            q, k = rotary.rotate(q, *rope), rotary.rotate(k, *rope)
        shape, precise = (I, self.heads, P, P), jnp.promote_types(x.dtype, jnp.float32)
        if not tap.idle(S.attn.mask, jax.ShapeDtypeStruct(shape, bool)):
            mask = tap(S.attn.mask, jnp.broadcast_to(True if mask is None else mask, shape))
        unread = tap.idle(S.attn.pattern, jax.ShapeDtypeStruct(shape, precise))
        pattern = None if unread else functools.partial(tap, S.attn.pattern)
        heads = attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, pattern=pattern)
        return self.o(tap(S.attn.heads, heads).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear maps with an activation between them, or three with a gate."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        E, F, bias = config.width, config.mlp, config.mlp_bias
        if config.gated:
            self.gate = layers.Linear(E, F, use_bias=bias, rngs=rngs)
        self.up = layers.Linear(E, F, use_bias=bias, rngs=rngs)
        self.down = layers.Linear(F, E, use_bias=bias, rngs=rngs)
        self.act, self.gated = config.act, config.gated

    def __call__(self, x: Float[Array, "I P E"], tap) -> Float[Array, "I P E"]:
        """Return the output of the last map."""
        act = layers.ACTIVATIONS[self.act]
        if self.gated:
            hidden = tap(S.mlp.act, act(self.gate(x))) * self.up(x)
        else:
            hidden = tap(S.mlp.act, act(self.up(x)))
        return self.down(hidden)


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        E = config.width
        self.norm1 = make_norm(config.norm, E, eps=config.eps, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = make_norm(config.norm, E, eps=config.eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.has_layer_scale = config.layer_scale
        if config.layer_scale:
            self.scale1, self.scale2 = (nnx.Param(jnp.ones((E,))) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "I P E"],
        tap,
        mask: Bool[Array, "I 1 #P P"] | None = None,
        rope: rotary.Rotation | None = None,
    ) -> Float[Array, "I P E"]:
        """Return the residual after the block.

        Args:
          x: The residual before the block.
          tap: The taps of this layer.
          mask: The patches that each patch attends to, the same for all or for each; None for all
            patches.
          rope: Cosine and sine of the angles by which queries and keys are rotated.
        """
        x = tap(S.resid_pre, x)
        out = self.attn(self.norm1(x), tap, mask, rope)
        x = x + tap(S.attn_out, out * self.scale1[...] if self.has_layer_scale else out)
        out = self.mlp(self.norm2(x), tap)
        x = x + tap(S.mlp.out, out * self.scale2[...] if self.has_layer_scale else out)
        return tap(S.resid_post, x)
