"""Dictionaries in the files of their publishers, and what their reference code computes, in NumPy.

Each maker writes files after a published layout and returns `encode` and `decode` as loops over
single vectors in float64, after the formulas of that layout's own code.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

D, M = 12, 20


def draw(seed: int, width_out: int = D) -> dict[str, np.ndarray]:
    """Return weights; thresholds and biases that leave some latents on and some off."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {
        "W_enc": normal(D, M, scale=D**-0.5), "b_enc": normal(M, scale=0.3),
        "W_dec": normal(M, width_out, scale=M**-0.5), "b_dec": normal(width_out, scale=0.5),
        "threshold": np.abs(normal(M, scale=0.4)),
    }  # fmt: skip


def relu(x):
    return np.maximum(x, 0)


def jump(pre, threshold):
    return np.where(pre > threshold, relu(pre), 0)


def top(pre, k):
    kept = np.zeros_like(pre)
    for i in sorted(range(len(pre)), key=lambda i: -pre[i])[:k]:
        kept[i] = relu(pre[i])
    return kept


def wide(weights):
    return {name: np.asarray(array, np.float64) for name, array in weights.items()}


def write(folder, name, arrays, config=None, fields=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path)
    if config:
        (folder / config).write_text(json.dumps(fields))


def saelens(folder, kind, norm="none", subtract=True, **more):
    """Write SAELens; `kind` is its architecture."""
    transcoder = kind.endswith("transcoder")
    weights = draw(0, D + 3 if transcoder else D)
    rng = np.random.default_rng(5)
    arrays = {name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    fields = {
        "architecture": kind, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": subtract, "normalize_activations": norm,
        "reshape_activations": "none", "metadata": {"sae_lens_version": "6.14.0"},
    } | more  # fmt: skip
    if "jumprelu" in kind:
        arrays["threshold"] = weights["threshold"]
    if kind == "gated":
        del arrays["b_enc"]
        for name in ("b_gate", "b_mag", "r_mag"):
            arrays[name] = (0.4 * rng.standard_normal(M)).astype(np.float32)
    if transcoder:
        fields["d_out"] = D + 3
    if "skip" in kind:
        arrays["W_skip"] = (0.2 * rng.standard_normal((D + 3, D))).astype(np.float32)
    write(folder, "sae_weights.safetensors", arrays, "cfg.json", fields)
    w = wide(arrays)
    length = np.linalg.norm(w["W_dec"], axis=1)
    rescaled = more.get("rescale_acts_by_decoder_norm", False)

    def normed(x):
        if norm == "constant_norm_rescale":
            factor = D**0.5 / np.linalg.norm(x)
            return x * factor, lambda y: y / factor
        if norm == "layer_norm":
            mean, deviation = x.mean(), x.std(ddof=1)
            return (x - mean) / (deviation + 1e-5), lambda y: y * deviation + mean
        return x, lambda y: y

    def encode(x):
        x = normed(x)[0]
        x = x - w["b_dec"] if subtract and not transcoder else x
        if kind == "gated":
            gate = x @ w["W_enc"] + w["b_gate"] > 0
            return gate * relu(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])
        pre = x @ w["W_enc"] + w["b_enc"]
        if kind == "topk":
            return top(pre * length if rescaled else pre, fields["k"])
        return jump(pre, w["threshold"]) if "jumprelu" in kind else relu(pre)

    def decode(z, x):
        y = (z / length if rescaled else z) @ w["W_dec"] + w["b_dec"]
        y = y if transcoder else normed(x)[1](y)
        return y + w["W_skip"] @ x if "skip" in kind else y

    return encode, decode


def gemma_scope(folder, name="params.npz", skip=False):
    """Write Gemma Scope; with `params.safetensors`, Gemma Scope 2."""
    weights = draw(1)
    if name.endswith("safetensors"):
        weights = {n.replace("W_", "w_"): a for n, a in weights.items()}
    if skip:
        rng = np.random.default_rng(6)
        weights["affine_skip_connection"] = (0.2 * rng.standard_normal((D, D))).astype(np.float32)
    write(folder, name, weights)
    w = wide({n.replace("w_", "W_"): a for n, a in weights.items()})

    def decode(z, x):
        y = z @ w["W_dec"] + w["b_dec"]
        return y + x @ w["affine_skip_connection"] if skip else y

    return lambda x: jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]), decode


def sparsify(folder, k=5, transcode=False, skip=False, **more):
    """Write EleutherAI's sae or sparsify; lmms-lab's multimodal-sae has the fields of the first."""
    weights = draw(2)
    arrays = {
        "encoder.weight": weights["W_enc"].T, "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"], "b_dec": weights["b_dec"],
    }  # fmt: skip
    fields = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": M, "k": k,
              "d_in": D, **more}  # fmt: skip
    if transcode or skip:
        fields |= {"transcode": transcode, "skip_connection": skip, "activation": "topk"}
    if skip:
        rng = np.random.default_rng(7)
        arrays["W_skip"] = (0.2 * rng.standard_normal((D, D))).astype(np.float32)
    write(folder, "sae.safetensors", arrays, "cfg.json", fields)
    w = wide(arrays)

    def encode(x):
        x = x if transcode else x - w["b_dec"]
        return top(relu(w["encoder.weight"] @ x + w["encoder.bias"]), k)

    def decode(z, x):
        y = z @ w["W_dec"] + w["b_dec"]
        return y + w["W_skip"] @ x if skip else y

    return encode, decode


def llama_scope(folder, learned=False, include=True, act="jumprelu"):
    """Write Llama Scope; with `learned` thresholds, its later form for reasoning models."""
    weights = draw(3)
    arrays = {
        "encoder.weight": weights["W_enc"].T, "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T, "decoder.bias": weights["b_dec"],
    }  # fmt: skip
    fields = {
        "d_model": D, "d_sae": M, "act_fn": act, "jump_relu_threshold": 0.25, "top_k": 6,
        "norm_activation": "dataset-wise", "use_decoder_bias": True,
        "dataset_average_activation_norm": {"in": 7.5, "out": 5.5},
        "sparsity_include_decoder_norm": include, "apply_decoder_bias_to_pre_encoder": False,
        "hook_point_in": "blocks.7.hook_resid_post",
    }  # fmt: skip
    if learned:
        arrays["log_jumprelu_threshold"] = np.log(weights["threshold"])
        write(folder, "sae_weights.safetensors", arrays, "config.json", fields)
    else:
        write(folder, "checkpoints/final.safetensors", arrays, "hyperparams.json", fields)
    w = wide(arrays)
    length = np.linalg.norm(w["decoder.weight"], axis=0) if include else np.ones(M)
    threshold = np.exp(w["log_jumprelu_threshold"]) if learned else 0.25

    def encode(x):
        pre = w["encoder.weight"] @ (x * (D**0.5 / 7.5)) + w["encoder.bias"]
        if act == "topk":
            return top(pre, 6)
        return jump(pre * length, threshold) / length

    def decode(z, x):
        return (w["decoder.weight"] @ z + w["decoder.bias"]) / (D**0.5 / 5.5)

    return encode, decode
