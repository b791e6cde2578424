"""Load a dictionary from the files of its publisher, and write one."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import files, store
from mllm_jax.checkpoints import archive, tensors
from mllm_jax.dictionaries import layouts
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.dictionaries.layouts import LAYOUTS, Layout, Tensors
from mllm_jax.typing import Float

_NORMS = {"none": "none", "constant": "constant_norm_rescale", "layer": "layer_norm"}


def load_dictionary(path: str | os.PathLike) -> Dictionary:
    """Return a sparse autoencoder or transcoder, float32 on the default device.

    It reads the files of SAELens, Gemma Scope (npz), Gemma Scope 2, Llama Scope, and EleutherAI's
    sae (sparsify), the layout that lmms-lab's multimodal-sae uses too.

    Args:
      path: Its folder, or the file of its tensors in that folder, or a repository of the hub and a
        folder in it: "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82".

    Raises:
      FileNotFoundError: There is no such folder, or no dictionary in it.
      OSError: A file cannot be read.
      ValueError: A file is damaged or does not match its layout.
    """
    folder, layout = _find(pathlib.Path(path).expanduser(), str(path))
    found = _read_tensors(folder / layout.weights)
    fields = files.read_json(folder / layout.config) if layout.config else {}
    problems: list[str] = []
    dictionary = None
    try:
        dictionary = layout.read(found, fields, problems)
    except ValueError as error:  # of a tensor
        problems.append(str(error))
    if dictionary is not None:
        layouts.check(dictionary, found, problems)
    if problems or dictionary is None:
        raise ValueError(files.refusal(folder, [f"as {layout.name}: {problems[0]}", *problems[1:]]))
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), dictionary)


def write_dictionary(dictionary: Dictionary, folder: str | os.PathLike) -> None:
    """Write a dictionary for `load_dictionary`, as SAELens or, with k and a skip map, as sparsify.

    Args:
      dictionary: The dictionary.
      folder: Its folder, which is created. Files of a dictionary in it are replaced.

    Raises:
      OSError: The folder cannot be written.
      ValueError: No layout supports such a dictionary: one with k and thresholds, or a transcoder
        with normalisation, or with k and unequal widths.
    """
    folder = pathlib.Path(folder)
    reads, _, returns = dictionary.widths
    is_transcoder = dictionary.skip is not None or reads != returns
    if dictionary.norm != "none" and is_transcoder:
        raise ValueError(f"no layout of files has a transcoder with norm='{dictionary.norm}'")
    if dictionary.k is not None and np.any(dictionary.threshold):
        raise ValueError("no layout of files supports both k and thresholds above 0")
    if dictionary.k is not None and reads != returns:
        raise ValueError(
            f"no layout of files has a transcoder with k from vectors of {reads} to {returns}"
        )
    if dictionary.k is not None and dictionary.skip is not None:
        name, arrays, fields = _sparsify_files(dictionary)
    else:
        name, arrays, fields = _saelens_files(dictionary)
    host = {key: np.ascontiguousarray(np.asarray(a, np.float32)) for key, a in arrays.items()}
    tensors.write(host, folder / name)
    store.atomic_json(folder / "cfg.json", fields)


def _find(path: pathlib.Path, name: str) -> tuple[pathlib.Path, Layout]:
    """Return the folder of a dictionary and its layout."""
    if path.is_file():
        for layout in LAYOUTS:
            folder = path.parents[layout.weights.count("/")]
            if folder / layout.weights == path and _has(folder, layout):
                return folder, layout
        raise FileNotFoundError(files.refusal(path, [_EXPECTED]))
    folder = local_folder(path, name)
    for layout in LAYOUTS:
        if _has(folder, layout):
            return folder, layout
    if (folder / "W_enc_0.safetensors").exists():
        problem = "a cross-layer transcoder, which mllm_jax.dictionaries.cross_layer.load reads"
        raise FileNotFoundError(files.refusal(folder, [problem]))
    raise FileNotFoundError(files.refusal(folder, [_EXPECTED]))


_EXPECTED = "no dictionary; its folder has " + ", or ".join(
    dict.fromkeys(
        f"{layout.weights} and {layout.config}" if layout.config else layout.weights
        for layout in LAYOUTS
    )
)


def _has(folder: pathlib.Path, layout: Layout) -> bool:
    names = layout.weights, *([layout.config] if layout.config else [])
    return all((folder / name).exists() for name in names)


def local_folder(path: pathlib.Path, name: str, pattern: str = "*") -> pathlib.Path:
    """Return a folder, or the local copy of a folder of a repository of the hub.

    Args:
      path: The folder.
      name: The repository and the folder in it, used if there is no such path.
      pattern: The files of that folder that are fetched.

    Raises:
      OSError: It cannot be fetched.
    """
    if path.is_dir():
        return path
    parts = name.strip("/").split("/")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [f"{inside}/{pattern}" if inside else pattern]
    try:
        found = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise files.unavailable(name, error) from error
    return found / inside


def _read_tensors(path: pathlib.Path) -> Tensors:
    """Return the tensors of an .npz or .safetensors file in float32."""
    if path.suffix == ".npz":
        found = _read_npz(files.regular(path))
    else:
        found = {tensor.key: tensor.read() for tensor in tensors.open_file(path)}
    for name, array in found.items():
        if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            problem = f"{files.line(name, 60)} holds {array.dtype}, not real numbers"
            raise ValueError(files.refusal(path, [problem]))
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        members = archive.members(path)
    except archive.Compressed:
        problem = "its arrays are compressed: save them again with np.savez"
        raise ValueError(files.refusal(path, [problem])) from None
    except archive.Damaged as error:
        problem = f"truncated or altered ({files.reason(error)}); fetch it again"
        raise ValueError(files.refusal(path, [problem])) from error
    found: dict[str, Any] = {}
    for name, member in members.items():
        try:
            with io.BytesIO(archive.read(path, member)) as opened:
                found[name.removesuffix(".npy")] = np.lib.format.read_array(
                    opened, allow_pickle=False
                )
        except (ValueError, EOFError, SyntaxError, TypeError) as error:
            problem = f"{files.line(name, 60)} is not a readable array ({files.reason(error)})"
            raise ValueError(files.refusal(path, [problem])) from error
    return found


def _saelens_files(dictionary: Dictionary) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of the file of tensors of SAELens, its tensors and its settings."""
    D, M, E = dictionary.widths
    threshold = np.broadcast_to(np.asarray(dictionary.threshold, np.float32), (M,))
    is_transcoder = dictionary.skip is not None or D != E
    bias, decoder_bias = dictionary.input_bias, np.asarray(dictionary.decoder_bias)
    shared = bias is not None and not is_transcoder and np.array_equal(bias, decoder_bias)
    # SAELens subtracts no bias from the input: fold it into that of the encoder.
    encoder_bias = dictionary.encoder_bias if shared else _whole_encoder_bias(dictionary)
    has_threshold = bool(threshold.any())
    kind = "jumprelu" if has_threshold else "standard"
    if is_transcoder:
        has_skip = dictionary.skip is not None
        kind = "jumprelu_" * has_threshold + "skip_" * has_skip + "transcoder"
    kind = "topk" if dictionary.k is not None else kind
    arrays: dict[str, Any] = {
        "W_enc": dictionary.encoder, "b_enc": encoder_bias,
        "W_dec": dictionary.decoder, "b_dec": dictionary.decoder_bias,
    }  # fmt: skip
    if has_threshold:
        arrays["threshold"] = threshold
    if dictionary.skip is not None:
        arrays["W_skip"] = np.asarray(dictionary.skip).T
    fields: dict[str, Any] = {
        "architecture": kind, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": bool(shared), "normalize_activations": _NORMS[dictionary.norm],
        "metadata": {"sae_lens_version": "6.0.0"},
    }  # fmt: skip
    if is_transcoder:
        fields["d_out"] = E
    if dictionary.k is not None:
        fields["k"] = dictionary.k
    return "sae_weights.safetensors", arrays, fields


def _sparsify_files(dictionary: Dictionary) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of the file of tensors of sparsify, its tensors and its settings."""
    D, M, _ = dictionary.widths
    assert dictionary.skip is not None, "only skip transcoders are written in this layout"
    arrays = {
        "encoder.weight": np.asarray(dictionary.encoder).T,
        "encoder.bias": _whole_encoder_bias(dictionary),
        "W_dec": dictionary.decoder, "b_dec": dictionary.decoder_bias,
        "W_skip": np.asarray(dictionary.skip).T,
    }  # fmt: skip
    fields = {
        "d_in": D, "num_latents": M, "k": dictionary.k, "activation": "topk", "transcode": True,
        "skip_connection": True,
    }  # fmt: skip
    return "sae.safetensors", arrays, fields


def _whole_encoder_bias(dictionary: Dictionary) -> Float[np.ndarray, " M"]:
    """Return the bias of the encoder with the input bias folded in, float64[M]."""
    bias = np.asarray(dictionary.encoder_bias, np.float64)
    if dictionary.input_bias is None:
        return bias
    moved = np.asarray(dictionary.input_bias, np.float64) @ np.asarray(
        dictionary.encoder, np.float64
    )
    return bias - moved
