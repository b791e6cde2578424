"""The Llama decoder (Touvron et al. 2023): rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import layers
from mllm_jax.models.cache import Cache
from mllm_jax.numerics import indexing, precision
from mllm_jax.sharding import mesh
from mllm_jax.sites import lm as S
from mllm_jax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama language model.

    Attributes:
      vocab: V. width: D. layers: L. heads: N. kv_heads: K. head_width: H. mlp: F.
      rope_theta: base of the rotary angles. eps: of the norms.
      tied: whether the head is the embedding.
    """

    vocab: int = 32064
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    mlp: int = 11008
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False

    @classmethod
    def vicuna_7b(cls) -> DecoderConfig:
        """Return the config of Vicuna 7B (Llama 2)."""
        return cls()

    @classmethod
    def vicuna_13b(cls) -> DecoderConfig:
        """Return the config of Vicuna 13B (Llama 2)."""
        return cls(width=5120, layers=40, heads=40, kv_heads=40, mlp=13824)

    @classmethod
    def mistral_7b(cls) -> DecoderConfig:
        """Version 0.2, which has no window: it is a Llama."""
        return cls(kv_heads=8, mlp=14336, rope_theta=1000000.0)

    @classmethod
    def smollm2_135m(cls) -> DecoderConfig:
        """Return the config of SmolLM2 135M."""
        return cls(
            vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, mlp=1536,
            rope_theta=100000.0, tied=True,
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> DecoderConfig:
        """Return a config small enough for tests."""
        return cls(vocab=96, width=32, layers=4, heads=4, kv_heads=2, head_width=8, mlp=48)


class Attention(nnx.Module):
    """Causal attention with rotary positions and grouped queries."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        D, H = config.width, config.head_width
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.q = layers.Linear(D, config.heads * H, use_bias=False, rngs=rngs)
        self.k = layers.Linear(D, config.kv_heads * H, use_bias=False, rngs=rngs)
        self.v = layers.Linear(D, config.kv_heads * H, use_bias=False, rngs=rngs)
        self.o = layers.Linear(config.heads * H, D, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], rope, mask, past, tap, only=None):
        """The heads' output, and this call's keys and values [B, K, T, H]."""
        B, T, _ = x.shape
        k = layers.rotate(self.k(x).reshape(B, T, self.kv_heads, -1), *rope).swapaxes(1, 2)
        v = self.v(x).reshape(B, T, self.kv_heads, -1).swapaxes(1, 2)
        if only is not None:
            x, mask = _take(x, only), _take(mask, only, axis=2)
            rope, T = [_take(part, only) for part in rope], 1
        q = layers.rotate(self.q(x).reshape(B, T, self.heads, -1), *rope)
        shape, precise = (B, self.heads, *mask.shape[2:]), jnp.promote_types(x.dtype, jnp.float32)
        if not tap.idle(S.attn.mask, jax.ShapeDtypeStruct(shape, bool)):
            mask = tap(S.attn.mask, jnp.broadcast_to(mask, shape))
        unread = tap.idle(S.attn.pattern, jax.ShapeDtypeStruct(shape, precise))
        pattern = None if unread else functools.partial(tap, S.attn.pattern)
        heads = layers.attention(q, k, v, mask, past=past, pattern=pattern, causal=only is None)
        heads = tap(S.attn.heads, heads)
        return self.o(heads.reshape(B, T, -1)), (k, v)


class MLP(nnx.Module):
    """The gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.gate = layers.Linear(config.width, config.mlp, use_bias=False, rngs=rngs)
        self.up = layers.Linear(config.width, config.mlp, use_bias=False, rngs=rngs)
        self.down = layers.Linear(config.mlp, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], tap) -> Float[Array, "B T D"]:
        """Apply the maps."""
        gate = tap(S.mlp.gate, self.gate(x))
        act = tap(S.mlp.act, layers.ACTIVATIONS["silu"](gate))
        gated = tap(S.mlp.gated, act * self.up(x))
        return tap(S.mlp.out, self.down(gated))


class Block(nnx.Module):
    """One decoder block with norms before its attention and its MLP."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm = layers.RMSNorm(config.width, eps=config.eps, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(config.width, eps=config.eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], rope, mask, past, tap, only=None):
        """The states, of all tokens or those at `only` int32[B]; keys and values of all."""
        x = tap(S.resid_pre, x)
        out, kv = self.attn(self.attn_norm(x), rope, mask, past, tap, only)
        x = x if only is None else _take(x, only)
        x = tap(S.resid_mid, x + tap(S.attn_out, out))
        x = x + self.mlp(self.mlp_norm(x), tap)
        return tap(S.resid_post, x), kv


def _take(array: Array, places: Int[Array, " B"], axis: int = 1) -> Array:
    """One place of an axis for each row; the axis stays."""
    at = places.reshape(-1, *(1,) * (array.ndim - 1))
    return jnp.take_along_axis(array, at, axis)


class Decoder(nnx.Module):
    """Embedding, decoder blocks, final norm and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        embed = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab, config.width))
        self.config = config
        self.embed = nnx.Param(embed)
        self.layers = layers.stack(lambda keys: Block(config, rngs=keys), config.layers, rngs)
        self.norm = layers.RMSNorm(config.width, eps=config.eps, rngs=rngs)
        if not config.tied:
            self.head = layers.Linear(config.width, config.vocab, use_bias=False, rngs=rngs)

    def embeddings(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Word embeddings. Ids outside the vocabulary (placeholders) give those of id 0."""
        # Chips that share its columns gather those: else they gather its rows, and what comes out.
        table = mesh.constrain(self.embed[...], ("V", "D"))
        ids = jnp.where((ids >= 0) & (ids < self.config.vocab), ids, 0)
        return indexing.index_without_upcast(table[ids], table, ids)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        tap,
        past: Cache | None = None,
        segment: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final normed states, and the cache of these T tokens.

        Args:
          x: embeddings.
          position: of each token in its row; a token sees valid tokens at its own or a lower one.
          valid: False for padding.
          tap: the taps of the LM.
          past: what was read before, S slots.
          segment: a token sees segment 0 and its own; None where there is one conversation a row.
        """
        key_position, key_valid = position, valid
        if past is not None:
            key_position = jnp.concatenate([past.position, position], 1)
            key_valid = jnp.concatenate([past.valid, valid], 1)
        mask = key_valid[:, None, None, :] & (
            key_position[:, None, None, :] <= position[:, None, :, None]
        )
        if segment is not None:
            mask &= (segment[:, None, None, :] == 0) | (
                segment[:, None, None, :] == segment[:, None, :, None]
            )
        rope = layers.rotary(position, self.config.head_width, self.config.rope_theta)
        pasts = None if past is None else (past.key, past.value)
        x, (key, value) = tap.scan(
            lambda layer, x, tap, kv, **only: layer(x, rope, mask, kv, tap, **only),
            self.layers, x, pasts,
        )  # fmt: skip
        return tap(S.norm, self.norm(x)), Cache(key, value, position, valid)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits of normed states, in float32 or better."""
        if self.config.tied:
            table = mesh.constrain(self.embed[...], ("V", "D"))
            return precision.einsum("...D,VD->...V", x, table, into_float32=True)
        kernel = mesh.constrain(self.head.kernel[...], ("D", "V"))
        return precision.einsum("...D,DV->...V", x, kernel, into_float32=True)

    def lens(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The logit lens: logits of a residual, as if it were the last (nostalgebraist 2020)."""
        return self.logits(self.norm(x))
