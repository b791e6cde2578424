"""Reads a llama-architecture GGUF file into Hugging-Face-named float32 arrays and a tokenizer.

Quantised tensors are dequantised: the result is the file's own few-bit values written as float32,
not the original checkpoint.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers
import tqdm

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_CONTROL = 3  # GGUF token type of special tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufLlama:
    """What a llama GGUF file holds, in Hugging Face terms.

    Attributes:
        tensors: HF `LlamaForCausalLM` key -> float32 array, linear weights as [out, in].
        config: the fields of a HF llama `config.json`.
        tokenizer: the byte-level BPE of the file, special tokens included.
        tokens: names of the special tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
        chat_template: Jinja source, or None when the file has none.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    tokens: dict[str, str]
    chat_template: str | None


def read(path: str | pathlib.Path, *, progress: bool = False) -> GgufLlama:
    """Reads and dequantises a llama GGUF file.

    Args:
        path: the `.gguf` file.
        progress: whether to show a bar over the tensors.

    Returns:
        Its tensors, configuration, tokenizer and chat template.

    Raises:
        ValueError: the file is not GGUF, is cut short, or holds another architecture or tokenizer.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error}); fetch it again") from error
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: architecture {fields.get('general.architecture')!r} is not supported; "
            "only 'llama' GGUF files are read"
        )
    config = _config(fields, tied="output.weight" not in {t.name for t in reader.tensors})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in tqdm.tqdm(reader.tensors, "reading the language model", disable=not progress):
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        place = tensor.name.split(".")[-2]
        if place in heads:
            weight = unpermute(weight, heads[place])
        tensors[_hf_name(tensor.name, path)] = weight
    return GgufLlama(
        tensors=tensors,
        config=config,
        tokenizer=_tokenizer(fields, path),
        tokens=_special_names(fields),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order that GGUF gives to the query and key weights of llama models.

    GGUF interleaves the two halves of each head, for a rotary embedding of neighbouring pairs; HF
    rotates the first half against the second.

    Args:
        weight: float[heads * head_width, in].
        heads: number of heads in `weight`.

    Returns:
        The same rows in HF order.
    """
    out, width = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(out, width))


def _hf_name(name: str, path: str | pathlib.Path) -> str:
    if name in _OUTER:
        return _OUTER[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if block == "blk" and rest in _IN_LAYER:
        return f"model.layers.{layer}.{_IN_LAYER[rest]}"
    raise ValueError(f"{path}: tensor {name!r} is not part of a llama model this reader knows")


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    width = fields["llama.embedding_length"]
    heads = fields["llama.attention.head_count"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _decimal(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(fields.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32: 9.99999975e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _special_names(fields: dict[str, Any]) -> dict[str, str]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {hf: fields.get(f"tokenizer.ggml.{name}_token_id") for hf, name in names.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    return {f"{hf}_token": tokens[i] for hf, i in ids.items() if i is not None}


def _tokenizer(fields: dict[str, Any], path: str | pathlib.Path) -> tokenizers.Tokenizer:
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{path}: tokenizer {kind} is not supported; only ('gpt2', 'smollm') is")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer
