"""The file layouts of published dictionaries: the meaning of their tensors and settings.

A layout is recognised by the names of its files. Its function turns tensors and settings into a
`Dictionary`, so that latents are those of the reference code of the layout.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.checkpoints import schema
from mllm_jax.dictionaries.dictionary import Dictionary, gated
from mllm_jax.typing import Float

Tensors = dict[str, Float[np.ndarray, "..."]]
_SIZE = schema.optional(schema.WIDTH)
_LATENTS = schema.whole(1, 2**28)
_NUMBER = schema.real(-1e30, 1e30)
_NOT_FALSE = schema.optional(schema.only(False))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of a dictionary in files.

    Attributes:
      name: Its name, for error messages.
      weights: The file of the tensors.
      config: The file of the settings; None if the tensors contain everything.
      read: (tensors, settings, problems) -> the dictionary. It removes the tensors that it has read
        and appends problems.
    """

    name: str
    weights: str
    config: str | None
    read: Callable[[Tensors, dict[str, Any], list[str]], Dictionary | None]


def take(tensors: Tensors, name: str, *shape: int | None) -> Float[np.ndarray, ...]:
    """Take a tensor out and check its shape, where None is any length.

    Raises:
      ValueError: It is missing or has another shape.
    """
    if name not in tensors:
        raise ValueError(f"has no tensor {name}")
    tensor = tensors.pop(name)
    right = len(tensor.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not right:
        want = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} is {list(tensor.shape)}, expected [{want}]")
    return tensor


def _settings(
    fields: Mapping[str, Any], table: schema.Table, problems: list[str]
) -> dict[str, Any]:
    return schema.values(fields, table, "", problems)


# SAELens: cfg.json before and after its version 6.
_SAELENS_KINDS = (
    "standard", "topk", "batchtopk", "jumprelu", "gated", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip
_SAELENS_NORMS = {
    "none": "none", "constant_norm_rescale": "constant", "layer_norm": "layer",
    "expected_average_only_in": "none",  # a factor, see `_norm_factor`
}  # fmt: skip
_SAELENS: schema.Table = {
    "architecture": (schema.only(*_SAELENS_KINDS), "standard"),
    "activation_fn": (schema.optional(schema.only("relu", "topk")), None),
    "activation_fn_str": (schema.optional(schema.only("relu", "topk")), None),
    "activation_fn_kwargs": (schema.PART, None),
    "k": (schema.optional(_LATENTS), None),
    "d_in": (_SIZE, None),
    "d_sae": (schema.optional(_LATENTS), None),
    "d_out": (_SIZE, None),
    "apply_b_dec_to_input": (schema.FLAG, True),
    "normalize_activations": (
        schema.optional(schema.only(False, True, *_SAELENS_NORMS)), "none"
    ),
    "norm_scaling_factor": (schema.optional(schema.real(1e-9, 1e9)), None),
    "rescale_acts_by_decoder_norm": (schema.FLAG, False),
    "finetuning_scaling_factor": (schema.optional(schema.FLAG), False),
}  # fmt: skip


def _read_saelens(
    tensors: Tensors, fields: dict[str, Any], problems: list[str]
) -> Dictionary | None:
    known = _settings(fields, _SAELENS, problems)
    kind = known["architecture"]
    if "topk" in (known["activation_fn"], known["activation_fn_str"]) and kind == "standard":
        kind = "topk"
    inner = _settings(known["activation_fn_kwargs"] or {}, {"k": _SAELENS["k"]}, problems)
    k = known["k"] or inner["k"]
    if kind == "topk" and k is None:
        problems.append("k, the number of latents of a token, is missing")
    if kind == "batchtopk" and "threshold" not in tensors:
        problems.append("a BatchTopK without threshold has no latents of one token: save it again")
    norm = _SAELENS_NORMS.get(known["normalize_activations"], "none")
    is_transcoder = kind.endswith("transcoder")
    if is_transcoder and norm != "none":
        problems.append("a transcoder with normalize_activations is not supported")
    if problems:
        return None
    encoder = take(tensors, "W_enc", known["d_in"], known["d_sae"])
    D, M = encoder.shape
    decoder = take(tensors, "W_dec", M, known["d_out"] if is_transcoder else D)
    E = decoder.shape[1]
    decoder_bias = take(tensors, "b_dec", E)
    factor = tensors.pop("finetuning_scaling_factor", tensors.pop("scaling_factor", None))
    if factor is not None:
        decoder = _scaled(decoder, factor, bool(known["finetuning_scaling_factor"]))
    norm_factor = _norm_factor(known)
    encoder, decoder, decoder_bias = (
        encoder * norm_factor, decoder / norm_factor, decoder_bias / norm_factor,
    )  # fmt: skip
    with_input = known["apply_b_dec_to_input"] and not is_transcoder
    common: dict[str, Any] = {
        "decoder": decoder, "decoder_bias": decoder_bias, "norm": norm,
        "input_bias": decoder_bias if with_input else None,
    }  # fmt: skip
    if kind == "gated":
        return gated(
            encoder=encoder, gate_bias=take(tensors, "b_gate", M),
            magnitude_bias=take(tensors, "b_mag", M), log_magnitude=take(tensors, "r_mag", M),
            **common,
        )  # fmt: skip
    encoder_bias = take(tensors, "b_enc", M)
    if known["rescale_acts_by_decoder_norm"]:
        encoder, encoder_bias, common["decoder"] = _in_units_of_decoder(
            encoder, encoder_bias, decoder
        )
    if "jumprelu" in kind or kind == "batchtopk":
        shape = tensors["threshold"].shape if "threshold" in tensors else (M,)
        common["threshold"] = take(tensors, "threshold", *(() if shape == () else (M,)))
    if "skip" in kind:
        common["skip"] = take(tensors, "W_skip", E, D).T
    return Dictionary(
        encoder=encoder, encoder_bias=encoder_bias, k=k if kind == "topk" else None, **common
    )


def _norm_factor(known: dict[str, Any]) -> np.float32:
    """Return the factor by which the weights expect activations to be multiplied.

    SAELens folds it into the weights at the end of training and then states no norm. The files of
    some older releases lack it: their factors are in its table `pretrained_saes.yaml`.
    """
    if known["normalize_activations"] != "expected_average_only_in":
        return np.float32(1)
    factor = known["norm_scaling_factor"]
    if factor is None:
        warnings.warn(
            "cfg.json has normalize_activations=expected_average_only_in but no "
            "norm_scaling_factor: unless the factor is in the weights already, latents are wrong; "
            "copy it from pretrained_saes.yaml of SAELens into cfg.json",
            stacklevel=2,
        )
    return np.float32(1 if factor is None else factor)


def _scaled(decoder: np.ndarray, factor: np.ndarray, is_used: bool) -> np.ndarray:
    """Return a decoder with each latent scaled by a factor from fine-tuning."""
    if factor.shape != (len(decoder),):
        raise ValueError(f"the scaling factor is {list(factor.shape)}, expected [{len(decoder)}]")
    if not is_used and not np.allclose(factor, 1):
        raise ValueError("has a scaling factor, but finetuning_scaling_factor is not true")
    return decoder * factor[:, None] if is_used else decoder


def _in_units_of_decoder(
    encoder: np.ndarray, encoder_bias: np.ndarray, decoder: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return encoder, bias and decoder rescaled so that each latent's direction has norm 1."""
    length = np.linalg.norm(decoder, axis=1)
    return encoder * length, encoder_bias * length, decoder / length[:, None]


# EleutherAI's sae, now sparsify; lmms-lab's multimodal-sae has its files.
_SPARSIFY: schema.Table = {
    "d_in": (_SIZE, None),
    "k": (_LATENTS, 32),
    "num_latents": (schema.optional(schema.whole(0, 2**28)), None),
    "expansion_factor": (schema.optional(schema.real(0, 2**20)), None),
    "activation": (schema.optional(schema.only("topk")), "topk"),
    "signed": (_NOT_FALSE, False),
    "transcode": (schema.optional(schema.FLAG), False),
    "skip_connection": (schema.optional(schema.FLAG), False),
}


def _read_sparsify(
    tensors: Tensors, fields: dict[str, Any], problems: list[str]
) -> Dictionary | None:
    known = _settings(fields, _SPARSIFY, problems)
    if "k" not in fields:
        problems.append("k, the number of latents of a token, is missing")
    if problems:
        return None
    encoder = take(tensors, "encoder.weight", known["num_latents"] or None, known["d_in"])
    M, D = encoder.shape
    decoder_bias = take(tensors, "b_dec", D)
    return Dictionary(
        encoder=encoder.T,
        encoder_bias=take(tensors, "encoder.bias", M),
        decoder=take(tensors, "W_dec", M, D),
        decoder_bias=decoder_bias,
        input_bias=None if known["transcode"] else decoder_bias,
        skip=take(tensors, "W_skip", D, D).T if known["skip_connection"] else None,
        k=known["k"],
    )


def _read_gemma_scope(
    tensors: Tensors, fields: dict[str, Any], problems: list[str]
) -> Dictionary | None:
    """Read Gemma Scope, whose keys are W_enc in npz files and w_enc in those of Gemma Scope 2."""
    tensors |= {f"W{name[1:]}": tensors.pop(name) for name in list(tensors) if name[:2] == "w_"}
    encoder = take(tensors, "W_enc", None, None)
    D, M = encoder.shape
    decoder = take(tensors, "W_dec", M, None)
    E = decoder.shape[1]
    skip = take(tensors, _SKIP, D, E) if _SKIP in tensors else None
    return Dictionary(
        encoder=encoder,
        encoder_bias=take(tensors, "b_enc", M),
        decoder=decoder,
        decoder_bias=take(tensors, "b_dec", E),
        threshold=take(tensors, "threshold", M),
        skip=skip,
    )


_SKIP = "affine_skip_connection"

# Llama Scope (lm_saes of OpenMOSS): hyperparams.json, later config.json.
_AVERAGES = {"in": (schema.real(1e-6, 1e9), None), "out": (schema.real(1e-6, 1e9), None)}
_LLAMA_SCOPE: schema.Table = {
    "d_model": (schema.WIDTH, None),
    "d_sae": (schema.optional(_LATENTS), None),
    "act_fn": (schema.only("relu", "jumprelu", "topk"), "jumprelu"),
    "top_k": (schema.optional(_LATENTS), None),
    "jump_relu_threshold": (schema.optional(_NUMBER), None),
    "norm_activation": (schema.only("dataset-wise", "inference", "none"), "dataset-wise"),
    "dataset_average_activation_norm": (schema.PART, None),
    "sparsity_include_decoder_norm": (schema.FLAG, True),
    "apply_decoder_bias_to_pre_encoder": (_NOT_FALSE, False),
    "use_decoder_bias": (schema.only(True), True),
    "use_glu_encoder": (_NOT_FALSE, False),
}


def _read_llama_scope(
    tensors: Tensors, fields: dict[str, Any], problems: list[str]
) -> Dictionary | None:
    known = _settings(fields, _LLAMA_SCOPE, problems)
    averages = known["dataset_average_activation_norm"]
    is_normed = known["norm_activation"] == "dataset-wise"
    lengths = _settings(averages or {}, _AVERAGES, problems)
    if is_normed and None in lengths.values():
        problems.append("dataset_average_activation_norm has no in and out")
    if known["act_fn"] == "topk" and known["top_k"] is None:
        problems.append("top_k, the number of latents of a token, is missing")
    if problems:
        return None
    encoder = take(tensors, "encoder.weight", known["d_sae"], known["d_model"]).T
    D, M = encoder.shape
    encoder_bias = take(tensors, "encoder.bias", M)
    decoder = take(tensors, "decoder.weight", D, M).T
    decoder_bias = take(tensors, "decoder.bias", D)
    threshold = np.zeros(M, np.float32)
    if "log_jumprelu_threshold" in tensors:
        threshold = np.exp(take(tensors, "log_jumprelu_threshold", M))
    elif known["act_fn"] == "jumprelu":
        if known["jump_relu_threshold"] is None:
            raise ValueError("has neither log_jumprelu_threshold nor jump_relu_threshold")
        threshold = np.full(M, known["jump_relu_threshold"], np.float32)
    is_top = known["act_fn"] == "topk"
    if known["sparsity_include_decoder_norm"]:
        if is_top:
            raise ValueError("topk with sparsity_include_decoder_norm is not supported")
        threshold = threshold / np.linalg.norm(decoder, axis=1)
    if is_normed:  # what the model has becomes of length sqrt(D) on average
        encoder = encoder * np.float32(D**0.5 / lengths["in"])
        back = np.float32(lengths["out"] / D**0.5)
        decoder, decoder_bias = decoder * back, decoder_bias * back
    return Dictionary(
        encoder=encoder, encoder_bias=encoder_bias, decoder=decoder, decoder_bias=decoder_bias,
        threshold=threshold, k=known["top_k"] if is_top else None,
    )  # fmt: skip


# In the order in which they are looked for.
LAYOUTS: tuple[Layout, ...] = (
    Layout("SAELens", "sae_weights.safetensors", "cfg.json", _read_saelens),
    Layout("sparsify", "sae.safetensors", "cfg.json", _read_sparsify),
    Layout("Gemma Scope", "params.npz", None, _read_gemma_scope),
    Layout("Gemma Scope 2", "params.safetensors", None, _read_gemma_scope),
    Layout("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", _read_llama_scope),
    Layout("Llama Scope", "sae_weights.safetensors", "config.json", _read_llama_scope),
)


def check(dictionary: Dictionary, unread: Tensors, problems: list[str]) -> None:
    """Append the problems of a dictionary that was read.

    Args:
      dictionary: The dictionary.
      unread: The tensors of its file that were not read.
      problems: A list to which problems are appended.
    """
    if unread:
        problems.append(f"has tensors that are not known: {files.some(sorted(unread))}")
    for field in dataclasses.fields(dictionary):
        value = getattr(dictionary, field.name)
        if isinstance(value, np.ndarray) and not np.isfinite(value).all():
            problems.append(f"the {field.name} has numbers that are not finite")
    latents = dictionary.widths[1]
    if dictionary.k is not None and dictionary.k > latents:
        problems.append(f"k is {dictionary.k}, but there are {latents} latents")
