"""One form of sparse autoencoders and transcoders, a pytree.

With pre = (norm(x) - input_bias) W_enc + b_enc, a latent is relu(pre) where pre exceeds its
threshold, and 0 elsewhere; with k, all but the k largest are 0. The kinds of the papers are:

* ReLU (Bricken et al. 2023): a threshold of 0.
* TopK (Gao et al. 2024): a threshold of 0, and k.
* BatchTopK (Bussmann et al. 2024): one threshold, which training has fixed.
* JumpReLU (Rajamanoharan et al. 2024b): a threshold for each latent.
* Gated (Rajamanoharan et al. 2024a): its gate shares the encoder, so that a latent with
  magnitude s exp(r) + b_mag is active where s + b_gate > 0, which is a threshold of its magnitude:
  b_mag - exp(r) b_gate. See `gated`.

A transcoder predicts a later site instead of its input; a skip transcoder adds x W_skip.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.numerics import precision
from mllm_jax.typing import AnyArray, Array, Float

Norm = Literal["none", "constant", "layer"]
_EPSILON = 1e-5  # of the layer norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dictionary:
    """A sparse autoencoder or a transcoder; D is its input width, E its output width.

    Attributes:
      encoder: The encoder, float32[D, M].
      encoder_bias: Its bias, float32[M].
      decoder: The decoder, float32[M, E]: one direction for each latent.
      decoder_bias: Its bias, float32[E].
      threshold: The threshold that a latent must exceed, float32[M] or float32[].
      input_bias: The bias subtracted from the normalised input, float32[D]; None for 0.
      skip: The linear map from the input to the output, float32[D, E]; None if there is none.
      k: The largest number of active latents of a token; None for any number. Static.
      norm: The normalisation of the input, which is undone in the output: "constant" scales to norm
        sqrt(D), "layer" to mean 0 and deviation 1. Static.
    """

    encoder: Float[AnyArray, "D M"]
    encoder_bias: Float[AnyArray, " M"]
    decoder: Float[AnyArray, "M E"]
    decoder_bias: Float[AnyArray, " E"]
    threshold: Float[AnyArray, ...] = dataclasses.field(
        default_factory=lambda: np.zeros((), np.float32)
    )
    input_bias: Float[AnyArray, " D"] | None = None
    skip: Float[AnyArray, "D E"] | None = None
    k: int | None = dataclasses.field(default=None, metadata={"static": True})
    norm: Norm = dataclasses.field(default="none", metadata={"static": True})

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of its input, of its latents and of its output."""
        D, M = self.encoder.shape
        return D, M, self.decoder.shape[-1]

    def encode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B M"]:
        """Return the latents of x, in float32 or better."""
        normed, _, _ = self._normed(x)
        if self.input_bias is not None:
            normed = normed - self.input_bias
        pre = (
            precision.einsum("...D,DM->...M", normed, jnp.asarray(self.encoder)) + self.encoder_bias
        )
        if self.k is not None:
            pre = _largest(pre, self.k)
        return jnp.where(pre > self.threshold, jax.nn.relu(pre), 0)

    def decode(self, latents: Float[Array, "*B M"], x: Float[Array, "*B D"]) -> Float[Array, ...]:
        """Return the reconstruction.

        Args:
          latents: The latents.
          x: The encoded input; the normalisation and the skip map need it.
        """
        _, scale, shift = self._normed(x)
        product = precision.einsum("...M,ME->...E", latents, jnp.asarray(self.decoder))
        y = (product + self.decoder_bias) * scale + shift
        if self.skip is None:
            return y
        return y + precision.einsum(
            "...D,DE->...E", precision.at_least_float32(x), jnp.asarray(self.skip)
        )

    def decode_change(
        self, change: Float[Array, "*B M"], x: Float[Array, "*B D"]
    ) -> Float[Array, ...]:
        """Return decode(latents + change, x) - decode(latents, x), which depends on no latents."""
        _, scale, _ = self._normed(x)
        return precision.einsum("...M,ME->...E", change, jnp.asarray(self.decoder)) * scale

    def reconstruct(self, x: Float[Array, "*B D"]) -> Float[Array, ...]:
        """Return the reconstruction of x."""
        return self.decode(self.encode(x), x)

    def _normed(self, x: Float[Array, "*B D"]) -> tuple[Array, Array | float, Array | float]:
        """Return the normalised input, and the scale and the shift that undo its norm."""
        x = precision.at_least_float32(jnp.asarray(x))
        if self.norm == "constant":
            root = _root((x * x).mean(-1, keepdims=True))
            scale = jnp.where(root > 0, root, 1)  # a vector of zeros stays
            return x / scale, scale, 0.0
        if self.norm == "layer":
            mean = x.mean(-1, keepdims=True)
            deviation = _root(x.var(-1, ddof=1, keepdims=True))
            return (x - mean) / (deviation + _EPSILON), deviation, mean
        return x, 1.0, 0.0


def gated(
    *,
    encoder: Float[AnyArray, "D M"],
    gate_bias: Float[AnyArray, " M"],
    magnitude_bias: Float[AnyArray, " M"],
    log_magnitude: Float[AnyArray, " M"],
    decoder: Float[AnyArray, "M E"],
    decoder_bias: Float[AnyArray, " E"],
    input_bias: Float[AnyArray, " D"] | None = None,
    norm: Norm = "none",
) -> Dictionary:
    """Return a gated autoencoder as a dictionary with thresholds.

    Args:
      encoder: The encoder of the gate.
      gate_bias: Its bias: a latent is active where the gate is above 0.
      magnitude_bias: The bias of the magnitude.
      log_magnitude: The logarithm of the encoder of the magnitude over that of the gate.
      decoder: See `Dictionary`.
      decoder_bias: See `Dictionary`.
      input_bias: See `Dictionary`.
      norm: See `Dictionary`.
    """
    ratio = np.exp(np.asarray(log_magnitude, np.float64))
    threshold = np.asarray(magnitude_bias, np.float64) - ratio * np.asarray(gate_bias, np.float64)
    return Dictionary(
        encoder=(np.asarray(encoder, np.float64) * ratio).astype(np.float32),
        encoder_bias=magnitude_bias,
        decoder=decoder,
        decoder_bias=decoder_bias,
        threshold=threshold.astype(np.float32),
        input_bias=input_bias,
        norm=norm,
    )


def _root(x: Float[Array, ...]) -> Float[Array, ...]:
    """Return the square root, with a derivative of 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _largest(x: Float[Array, "*B M"], k: int) -> Float[Array, "*B M"]:
    """Return x where it is one of the k largest of its vector, the first of equal ones, else 0."""
    values, places = jax.lax.top_k(x, k)
    return jnp.put_along_axis(jnp.zeros_like(x), places, values, -1, inplace=False)
