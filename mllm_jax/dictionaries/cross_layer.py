"""Cross-layer transcoders: latents that read one layer and write to it and to all later ones.

Each layer has its own latents, relu(x W_enc + b_enc) of its input x, or 0 up to their threshold
(JumpReLU). They write to the MLP's output in their layer and in each later layer, with one decoder
for each pair of layers (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in
Language Models").

    transcoder = cross_layer.load("folder")
    splice = mj.splice(S.lm.mlp.out, transcoder, reads=S.lm.resid_mid)
    mj.run(model, batch, splice >> mj.ablate(S.lm.mlp.out.latents[3, [17, 93]]))

The files are those of circuit-tracer: for each layer i `W_enc_{i}.safetensors` with W_enc_{i}
[M, D], b_enc_{i} [M], b_dec_{i} [E] and, for JumpReLU, threshold_{i} [M]; and
`W_dec_{i}.safetensors` with W_dec_{i} [M, L - i, E].
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mllm_jax import files
from mllm_jax.checkpoints import tensors
from mllm_jax.dictionaries.layouts import Tensors, take
from mllm_jax.dictionaries.load import local_folder
from mllm_jax.numerics import precision
from mllm_jax.typing import AnyArray, Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossLayerTranscoder:
    """A cross-layer transcoder; E is its output width.

    Attributes:
      encoder: The encoders, [L, D, M].
      encoder_bias: Their biases, [L, M].
      decoders: The decoders of the latents of each layer i, [M, L - i, E]: to its own layer and to
        each later one.
      decoder_bias: The biases of the layers that are written, [L, E].
      threshold: The threshold that each latent must exceed, [L, M].
    """

    encoder: Float[AnyArray, "L D M"]
    encoder_bias: Float[AnyArray, "L M"]
    decoders: tuple[Float[AnyArray, "M K E"], ...]
    decoder_bias: Float[AnyArray, "L E"]
    threshold: Float[AnyArray, "L M"]

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of its input, of the latents of a layer and of its output."""
        _, D, M = self.encoder.shape
        return D, M, self.decoder_bias.shape[-1]

    @property
    def layers(self) -> int:
        """The number L of its layers."""
        return len(self.decoders)

    def encode(
        self, x: Float[Array, "*B D"], layer: int | Int[AnyArray, ""]
    ) -> Float[Array, "*B M"]:
        """Return the latents of one layer, in float32 or better."""
        arrays = self.encoder, self.encoder_bias, self.threshold
        encoder, bias, threshold = (jnp.asarray(array)[layer] for array in arrays)
        pre = precision.einsum("...D,DM->...M", precision.at_least_float32(x), encoder) + bias
        return jnp.where(pre > threshold, pre, 0)

    def write(
        self, latents: Float[Array, "*B M"], layer: int | Int[AnyArray, ""]
    ) -> Float[Array, "L *B E"]:
        """Return what the latents of one layer add to the reconstruction of each layer."""

        def from_layer(decoder: Float[AnyArray, "M K E"]) -> Callable[[Array], Array]:
            def write(latents: Array) -> Array:
                y = precision.einsum("...M,MKE->K...E", latents, jnp.asarray(decoder))
                return jnp.pad(y, ((self.layers - len(y), 0), *((0, 0),) * (y.ndim - 1)))

            return write

        return jax.lax.switch(layer, [from_layer(decoder) for decoder in self.decoders], latents)

    def constant(
        self, x: Float[Array, "*B D"], layer: int | Int[AnyArray, ""]
    ) -> Float[Array, " E"]:
        """Return the part of the reconstruction of one layer that no latent adds: its bias."""
        return precision.at_least_float32(jnp.asarray(self.decoder_bias)[layer])

    def reconstruct(self, x: Float[Array, "L *B D"]) -> Float[Array, "L *B E"]:
        """Return the reconstruction of each layer from the inputs of all layers."""
        total = jnp.zeros(
            (*x.shape[:-1], self.widths[2]), precision.at_least_float32_dtype(x.dtype)
        )
        for layer in range(self.layers):
            total = total + self.write(self.encode(x[layer], layer), layer)
        bias = [self.constant(x[layer], layer) for layer in range(self.layers)]
        return total + jnp.stack(bias).reshape(self.layers, *(1,) * (x.ndim - 2), -1)


def load(path: str | os.PathLike, dtype: DTypeLike = jnp.float32) -> CrossLayerTranscoder:
    """Return a cross-layer transcoder from circuit-tracer's files, on the default device.

    The site that its latents read is not in these files: it is `feature_input_hook` in the
    `config.yaml` beside them, where hook_resid_mid is `lm.resid_mid`.

    Args:
      path: Its folder, or a repository of the hub and a folder in it, as in `load_dictionary`.
      dtype: The dtype of its arrays. Decoders are L (L + 1) / 2 matrices; bfloat16 halves them.

    Raises:
      FileNotFoundError: There is no such folder, or no cross-layer transcoder in it.
      OSError: A file cannot be read.
      ValueError: A file is damaged or does not match its layout.
    """
    folder = local_folder(pathlib.Path(path).expanduser(), str(path), "W_*.safetensors")
    count = 0
    while (folder / f"W_enc_{count}.safetensors").exists():
        count += 1
    if not count:
        raise FileNotFoundError(
            files.refusal(folder, ["no cross-layer transcoder; its folder has W_enc_0.safetensors"])
        )
    layers: list[dict[str, Array]] = []
    for layer in range(count):
        try:
            layers.append(_read_layer(folder, layer, count, layers[0] if layers else None, dtype))
        except ValueError as error:
            problem = f"as circuit-tracer's layer {layer} of {count}: {error}"
            raise ValueError(files.refusal(folder, [problem])) from error
    encoder, bias, threshold, decoder_bias = (
        jnp.stack([layer[name] for layer in layers])
        for name in ("W_enc", "b_enc", "threshold", "b_dec")
    )
    return CrossLayerTranscoder(
        encoder=encoder, encoder_bias=bias, threshold=threshold, decoder_bias=decoder_bias,
        decoders=tuple(layer["W_dec"] for layer in layers),
    )  # fmt: skip


def _read_layer(
    folder: pathlib.Path, layer: int, count: int, first: dict[str, Array] | None, dtype: DTypeLike
) -> dict[str, Array]:
    """Return the tensors of one layer, without its number in their names.

    Raises:
      ValueError: A tensor is missing, of another shape than in the first layer, or not finite.
    """
    found: Tensors = {}
    for kind in ("enc", "dec"):
        for tensor in tensors.open_file(folder / f"W_{kind}_{layer}.safetensors"):
            found[tensor.key] = np.asarray(tensor.read(), np.float32)
    D, M = (None, None) if first is None else first["W_enc"].shape
    encoder = take(found, f"W_enc_{layer}", M, D)
    M, D = encoder.shape
    E = None if first is None else first["b_dec"].shape[0]
    arrays = {
        "W_enc": encoder.T,
        "b_enc": take(found, f"b_enc_{layer}", M),
        "b_dec": take(found, f"b_dec_{layer}", E),
        "threshold": np.zeros(M, np.float32),
    }
    if f"threshold_{layer}" in found:
        arrays["threshold"] = take(found, f"threshold_{layer}", M)
    arrays["W_dec"] = take(found, f"W_dec_{layer}", M, count - layer, len(arrays["b_dec"]))
    if found:
        raise ValueError(f"has tensors that are not known: {files.some(sorted(found))}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name}_{layer} has numbers that are not finite")
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def write(transcoder: CrossLayerTranscoder, folder: str | os.PathLike) -> None:
    """Write a cross-layer transcoder for `load`, in float32.

    Args:
      transcoder: The transcoder.
      folder: Its folder, which is created. Files of a transcoder in it are replaced.

    Raises:
      OSError: The folder cannot be written.
    """
    folder = pathlib.Path(folder)
    for layer, decoder in enumerate(transcoder.decoders):
        encoder = {
            "W_enc": np.asarray(transcoder.encoder[layer]).T,
            "b_enc": transcoder.encoder_bias[layer],
            "b_dec": transcoder.decoder_bias[layer],
            "threshold": transcoder.threshold[layer],
        }
        for kind, arrays in (("enc", encoder), ("dec", {"W_dec": decoder})):
            named = {
                f"{name}_{layer}": np.ascontiguousarray(np.asarray(array, np.float32))
                for name, array in arrays.items()
            }
            tensors.write(named, folder / f"W_{kind}_{layer}.safetensors")
