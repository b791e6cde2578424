"""A decoder with rotary positions, grouped queries and gated MLPs (Touvron et al. 2023)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.models import attention, layers, rotary
from mllm_jax.models.cache import Cache
from mllm_jax.numerics import indexing, precision
from mllm_jax.positions import Positions
from mllm_jax.sharding import mesh
from mllm_jax.sites import lm as S
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A language model.

    Attributes:
      vocab: The vocabulary size V.
      width: The width D.
      layers: The number of layers L.
      heads: The number of heads N.
      kv_heads: The number of key-value heads K.
      head_width: The head width H.
      mlp: The number of neurons of an MLP, F.
      act: The activation of the gate.
      rope_theta: The base of the rotary angles.
      rope_scaling: The scaling of the frequencies for long rows; None for no scaling.
      rope_sections: The axis of position of each frequency (mRoPE); None if a position is one
        number.
      local_rope_theta: The base, without scaling, in layers with a window (Gemma 3); None for
        `rope_theta`.
      windows: The number of last positions that each layer attends to, 0 for all; empty if no
        layer has a window.
      window_within_block: Whether a window also limits attention within a block of tokens
        (Gemma 3), or only attention to other tokens (PaliGemma 2).
      eps: The epsilon of the norms.
      unit_offset: Whether the factor of a norm is 1 + scale (Gemma).
      biases: The attention projections that have a bias: "", "qkv" (Qwen2) or "qkvo".
      qk_norm: Whether queries and keys are normalised by head (Qwen3, Gemma 3).
      post_norms: Whether the outputs of attention and MLP are normalised as well (Gemma 2).
      query_scale: The factor of the products of queries and keys; None for 1 / sqrt(H).
      attention_softcap: The bound of these products (Gemma 2); None if there is none.
      logit_softcap: The bound of the logits (Gemma 2); None if there is none.
      embedding_scale: The factor of word embeddings, rounded to their dtype: sqrt(D) in Gemma.
      tied: Whether the head shares the matrix of the embedding.
    """

    vocab: int = 32064
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    mlp: int = 11008
    act: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: rotary.RopeScaling | None = None
    rope_sections: rotary.RopeSections | None = None
    local_rope_theta: float | None = None
    windows: tuple[int, ...] = ()
    window_within_block: bool = True
    eps: float = 1e-5
    unit_offset: bool = False
    biases: Literal["", "qkv", "qkvo"] = ""
    qk_norm: bool = False
    post_norms: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tied: bool = False

    @classmethod
    def vicuna_7b(cls) -> DecoderConfig:
        """Return the config of Vicuna 7B."""
        return cls()

    @classmethod
    def vicuna_13b(cls) -> DecoderConfig:
        """Return the config of Vicuna 13B."""
        return cls(width=5120, layers=40, heads=40, kv_heads=40, mlp=13824)

    @classmethod
    def mistral_7b(cls) -> DecoderConfig:
        """Return the config of Mistral 7B version 0.2, which has no sliding window."""
        return cls(kv_heads=8, mlp=14336, rope_theta=1000000.0)

    @classmethod
    def llama3_8b(cls) -> DecoderConfig:
        """Return the config of Llama 3 8B."""
        return cls(vocab=128256, kv_heads=8, mlp=14336, rope_theta=500000.0)

    @classmethod
    def qwen2_0_5b(cls) -> DecoderConfig:
        """Return the config of Qwen2 0.5B."""
        return cls(
            vocab=151936, width=896, layers=24, heads=14, kv_heads=2, head_width=64, mlp=4864,
            rope_theta=1000000.0, eps=1e-6, biases="qkv", tied=True,
        )  # fmt: skip

    @classmethod
    def qwen2_7b(cls) -> DecoderConfig:
        """Return the config of Qwen2 7B."""
        return cls(
            vocab=152064, width=3584, layers=28, heads=28, kv_heads=4, mlp=18944,
            rope_theta=1000000.0, eps=1e-6, biases="qkv",
        )  # fmt: skip

    @classmethod
    def qwen2_72b(cls) -> DecoderConfig:
        """Return the config of Qwen2 72B."""
        return cls(
            vocab=152064, width=8192, layers=80, heads=64, kv_heads=8, mlp=29568,
            rope_theta=1000000.0, eps=1e-6, biases="qkv",
        )  # fmt: skip

    @classmethod
    def smollm2_135m(cls) -> DecoderConfig:
        """Return the config of SmolLM2 135M."""
        return cls(
            vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, mlp=1536,
            rope_theta=100000.0, tied=True,
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> DecoderConfig:
        """Return a config for tests."""
        return cls(vocab=96, width=32, layers=4, heads=4, kv_heads=2, head_width=8, mlp=48)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """The inputs of a layer besides the states; in a scan each array has a leading axis L.

    Attributes:
      past: The keys and values of earlier tokens, [B, K, S, H] each; or None.
      window: The number of last positions that it attends to, int32[], 0 for all; None if no
        layer has a window.
      number: The number of the layer, int32[]; None if no layer needs it.
    """

    past: tuple[Array, Array] | None = None
    window: Int[Array, ""] | None = None
    number: Int[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reach:
    """The keys that the queries attend to, and the rotation of both.

    Attributes:
      mask: bool[B, N or 1, T, S].
      query_rotation: Cosine and sine of the queries' angles.
      key_rotation: Cosine and sine of the keys' angles.
      causal: Whether no query attends to a later key; static.
    """

    mask: Bool[Array, "B 1 T S"]
    query_rotation: rotary.Rotation
    key_rotation: rotary.Rotation
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    def at(self, places: Int[Array, " B"]) -> Reach:
        """Return the reach of one query of each row."""
        cos, sin = self.query_rotation
        rotation = _take(cos, places), _take(sin, places)
        return Reach(_take(self.mask, places, axis=2), rotation, self.key_rotation, False)


class Attention(nnx.Module):
    """Attention with rotary positions and grouped queries."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        D, H = config.width, config.head_width
        self.config = config
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            bias = name in config.biases
            setattr(self, name, layers.Linear(D, heads * H, use_bias=bias, rngs=rngs))
        self.o = layers.Linear(config.heads * H, D, use_bias="o" in config.biases, rngs=rngs)
        if config.qk_norm:
            self.q_norm, self.k_norm = (_norm(config, H, rngs) for _ in range(2))

    def project(
        self, name: Literal["q", "k", "v"], x: Float[Array, "B T D"]
    ) -> Float[Array, "B T heads H"]:
        """Return queries, keys or values by head, before their norm and their rotation."""
        return getattr(self, name)(x).reshape(*x.shape[:2], -1, self.config.head_width)

    def _heads(self, name: Literal["q", "k", "v"], x: Float[Array, "B T D"], tap):
        """Return queries, keys or values by head, [B, T, heads, H]."""
        heads = tap(getattr(S.attn, name), self.project(name, x))
        if self.config.qk_norm and name != "v":
            heads = getattr(self, f"{name}_norm")(heads)
        return heads

    def __call__(self, x: Float[Array, "B T D"], reach: Reach, past, tap, only=None):
        """Return the output of the heads, and the keys and values [B, K, T, H] of this call."""
        k = rotary.rotate(self._heads("k", x, tap), *reach.key_rotation).swapaxes(1, 2)
        v = self._heads("v", x, tap).swapaxes(1, 2)
        if only is not None:
            x, reach = _take(x, only), reach.at(only)
        q = rotary.rotate(self._heads("q", x, tap), *reach.query_rotation)
        mask, (B, T, N, _) = reach.mask, q.shape
        shape, precise = (B, N, *mask.shape[2:]), jnp.promote_types(x.dtype, jnp.float32)
        if not tap.idle(S.attn.mask, jax.ShapeDtypeStruct(shape, bool)):
            mask = tap(S.attn.mask, jnp.broadcast_to(mask, shape))
        unread = tap.idle(S.attn.pattern, jax.ShapeDtypeStruct(shape, precise))
        pattern = None if unread else functools.partial(tap, S.attn.pattern)
        heads = attention.attend(
            q, k, v, mask, past=past, pattern=pattern, causal=reach.causal,
            scale=self.config.query_scale, softcap=self.config.attention_softcap,
        )  # fmt: skip
        heads = tap(S.attn.heads, heads)
        return self.o(heads.reshape(B, T, -1)), (k, v)


class MLP(nnx.Module):
    """A gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.act = config.act
        self.gate = layers.Linear(config.width, config.mlp, use_bias=False, rngs=rngs)
        self.up = layers.Linear(config.width, config.mlp, use_bias=False, rngs=rngs)
        self.down = layers.Linear(config.mlp, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], tap) -> Float[Array, "B T D"]:
        """Return the output of the last map."""
        x = tap(S.mlp.input, x)
        gate = tap(S.mlp.gate, self.gate(x))
        act = tap(S.mlp.act, layers.ACTIVATIONS[self.act](gate))
        gated = tap(S.mlp.gated, act * self.up(x))
        return self.down(gated)


class Block(nnx.Module):
    """A pre-norm decoder layer; with `post_norms` its outputs are normalised too."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm = _norm(config, config.width, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, config.width, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.attn_post_norm, self.mlp_post_norm = (
                _norm(config, config.width, rngs) for _ in range(2)
            )

    def __call__(self, x: Float[Array, "B T D"], reach: Reach, past, tap, only=None):
        """Return the states of all tokens, or those at `only` int32[B], and all keys and values."""
        x = tap(S.resid_pre, x)
        out, kv = self.attn(self.attn_norm(x), reach, past, tap, only)
        out = self.attn_post_norm(out) if self.post_norms else out
        x = x if only is None else _take(x, only)
        x = tap(S.resid_mid, x + tap(S.attn_out, out))
        return tap(S.resid_post, x + self.added_by_mlp(x, tap)), kv

    def added_by_mlp(self, x: Float[Array, "B T D"], tap) -> Float[Array, "B T D"]:
        """Return the output of the MLP, which is added to the residual."""
        out = self.mlp(self.mlp_norm(x), tap)
        return tap(S.mlp.out, self.mlp_post_norm(out) if self.post_norms else out)

    def split_by_head(self, heads: Float[Array, "*B N H"]) -> Float[Array, "*B N D"]:
        """Return the contribution of each head to the residual, in float32 or better.

        The sum over the heads is the output of attention without the bias of its output projection.
        The factor of a norm after attention is treated as a constant.

        Args:
          heads: The result of each head, as at `lm.attn.heads`.
        """
        heads = precision.at_least_float32(heads)
        kernel = precision.at_least_float32(self.attn.o.kernel[...])
        parts = precision.einsum("...NH,NHD->...ND", heads, kernel.reshape(*heads.shape[-2:], -1))
        if not self.post_norms:
            return parts
        total = parts.sum(-2)
        if self.attn.o.bias is not None:
            total = total + self.attn.o.bias[...]
        return parts * jax.lax.stop_gradient(self.attn_post_norm.factor(total))[..., None, :]


def _norm(config: DecoderConfig, width: int, rngs: nnx.Rngs) -> layers.RMSNorm:
    return layers.RMSNorm(width, eps=config.eps, unit_offset=config.unit_offset, rngs=rngs)


def _take(array: Array, places: Int[Array, " B"], axis: int = 1) -> Array:
    """Take one index of an axis for each row, and keep the axis."""
    index = places.reshape(-1, *(1,) * (array.ndim - 1))
    return jnp.take_along_axis(array, index, axis)


def _reach(
    mask: Bool[Array, "B 1 T S"],
    distance: Int[Array, "B 1 T S"] | None,
    rotations: tuple[rotary.Rotation, rotary.Rotation | None],
    window: Int[Array, ""] | None,
    causal: bool,
) -> Reach:
    """Return the reach of a layer.

    Args:
      mask: The attention mask without a window.
      distance: The position of each query minus that of each key; None if no layer has a window.
      rotations: As `Decoder._rotations` returns them.
      window: The window of the layer, 0 for none.
      causal: Whether no query attends to a later key.
    """
    rotation, local = rotations
    if window is not None and distance is not None:
        mask = mask & ((distance < window) | (window == 0))
        if local is not None:
            is_local = window > 0
            cos, sin = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local, rotation)
            rotation = cos, sin
    return Reach(mask, rotation, rotation, causal)


def _add_deepstack(
    x: Float[Array, "B T D"],
    deepstack: Float[Array, "k B T D"] | None,
    number: Int[Array, ""] | None,
    only: Int[Array, " B"] | None,
) -> Float[Array, "B T D"]:
    """Add the DeepStack features for the states after the layer of this number, if any."""
    if deepstack is None or number is None:
        return x
    count = len(deepstack)
    added = deepstack[jnp.minimum(number, count - 1)]
    added = added if only is None else _take(added, only)
    return jnp.where(number < count, x + added.astype(x.dtype), x)


class Decoder(nnx.Module):
    """A language model: embedding, decoder layers, norm and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        embed = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab, config.width))
        self.config = config
        self.embed = nnx.Param(embed)
        self.layers = layers.stack(lambda keys: Block(config, rngs=keys), config.layers, rngs)
        self.norm = _norm(config, config.width, rngs)
        if not config.tied:
            self.head = layers.Linear(config.width, config.vocab, use_bias=False, rngs=rngs)

    def embeddings(self, ids: Int[AnyArray, "B T"]) -> Float[Array, "B T D"]:
        """Return word embeddings; ids outside the vocabulary (placeholders) count as id 0."""
        # Gather the sharded columns; otherwise devices would gather rows and the result.
        table = mesh.constrain(self.embed[...], ("V", "D"))
        ids = jnp.where((ids >= 0) & (ids < self.config.vocab), ids, 0)
        words = indexing.index_without_upcast(table[ids], table, ids)
        scale = self.config.embedding_scale
        return words if scale == 1 else words * jnp.asarray(scale, words.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Positions,
        tap,
        past: Cache | None = None,
        deepstack: Float[Array, "k B T D"] | None = None,
        layers: tuple[Block, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the final normalised states, and the cache of these T tokens.

        Args:
          x: Embeddings.
          positions: The positions of the tokens, and which of them attend to which.
          tap: The taps of the language model.
          past: The cache of earlier tokens, with S slots.
          deepstack: The features added to the states after each of the first k layers (DeepStack,
            Meng et al. 2024); None if there are none.
          layers: Separate layers, as `layers_one_by_one` returns them; None for a scan.
        """
        order, valid = positions.order, positions.valid
        if past is not None:
            order = jnp.concatenate([past.position, order], 1)
            valid = jnp.concatenate([past.valid, valid], 1)
        mask, distance = positions.mask(order, valid), None
        if self.config.windows:
            distance = positions.order[:, None, :, None] - order[:, None, None, :]
            if positions.block is not None and not self.config.window_within_block:
                distance = jnp.where(positions.same_block(order.shape[1]), 0, distance)
        rotations = self._rotations(positions)

        def step(layer, x, tap, inputs, only=None):
            reach = _reach(mask, distance, rotations, inputs.window, positions.is_causal)
            x, kv = layer(x, reach, inputs.past, tap, only)
            return _add_deepstack(x, deepstack, inputs.number, only), kv

        inputs = LayerInputs(
            past=None if past is None else (past.key, past.value),
            window=jnp.asarray(self.config.windows, jnp.int32) if self.config.windows else None,
            number=None if deepstack is None else jnp.arange(self.config.layers),
        )
        x, (key, value) = tap.scan(step, layers or self.layers, x, inputs)
        cache = Cache(key, value, positions.order, positions.valid)
        return tap(S.norm, self.norm(x)), cache

    def layers_one_by_one(self) -> tuple[Block, ...]:
        """Return the layers with separate arrays, for passes of few tokens.

        A scan slices each layer's weights from the stacked arrays, writes them and reads them
        again; with few tokens, this costs more than the products.
        """
        graph, state = nnx.split(self.layers)
        count = self.config.layers
        each = (jax.tree.map(lambda a, i=i: a[i], state) for i in range(count))
        return tuple(cast(Block, nnx.merge(graph, one)) for one in each)

    def _rotations(self, positions: Positions) -> tuple[rotary.Rotation, rotary.Rotation | None]:
        """Return the rotation of each token, and that of layers with a window if it differs."""
        config = self.config
        position = positions.order if positions.rotary is None else positions.rotary

        def rotation(theta, scaling):
            frequency = rotary.frequencies(config.head_width, theta, scaling)
            return rotary.rotation(position, frequency, config.rope_sections)

        whole = rotation(config.rope_theta, config.rope_scaling)
        if config.local_rope_theta is None:
            return whole, None
        return whole, rotation(config.local_rope_theta, None)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return next-token logits of normalised states, in float32 or better."""
        if self.config.tied:
            table = mesh.constrain(self.embed[...], ("V", "D"))
            logits = precision.einsum("...D,VD->...V", x, table, into_float32=True)
        else:
            kernel = mesh.constrain(self.head.kernel[...], ("D", "V"))
            logits = precision.einsum("...D,DV->...V", x, kernel, into_float32=True)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def unembedding(self, ids: Int[AnyArray, "*B"]) -> Float[Array, "*B D"]:
        """Return the rows of the head: a logit, before its soft cap, is their product with x."""
        if self.config.tied:
            return self.embed[...][ids]
        return jnp.moveaxis(self.head.kernel[...][:, ids], 0, -1)

    def lens(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return the logits of a residual as if it were the last (nostalgebraist 2020)."""
        return self.logits(self.norm(x))
