"""Read a GGUF file of a Llama into float32 arrays with Hugging Face keys, and a tokenizer.

Quantised tensors are dequantised: the values are those of the file in float32, not those of the
original checkpoint.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import struct
from typing import Any

import gguf
import numpy as np
import tokenizers
import tqdm

from mllm_jax import files
from mllm_jax.checkpoints.networks import decoder

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
    """The content of a GGUF file of a Llama, in the terms of Hugging Face.

    Attributes:
        tensors: float32 arrays by key of `LlamaForCausalLM`; linear weights are [out, in].
        config: the fields of the `config.json`.
        tokenizer: the byte-level BPE tokenizer of the file, with its special tokens.
        tokens: the special tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
        chat_template: the chat template in Jinja; None where the file has none.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    tokens: dict[str, str]
    chat_template: str | None


def read(path: str | pathlib.Path, *, progress: bool = False) -> GgufLlama:
    """Read and dequantise a GGUF file of a Llama.

    Args:
        path: the `.gguf` file.
        progress: whether to show a progress bar.

    Returns:
        The tensors, config, tokenizer and chat template.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is not a regular file.
        ValueError: the file is not GGUF, is truncated, or has another architecture or tokenizer.
    """
    path = files.regular(path)
    try:
        return _read(path, progress)
    except _Unsupported as error:
        raise ValueError(files.refusal(path, [error])) from error
    except Exception as error:  # the reader can raise anything for a damaged file
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        reason = files.line(reason or type(error).__name__, 120)
        raise ValueError(
            files.refusal(path, [f"not a readable GGUF file ({reason}); fetch it again"])
        ) from error


class _Unsupported(Exception):
    """The file is sound GGUF of an unsupported model."""


def _read(path: pathlib.Path, progress: bool) -> GgufLlama:
    _check_counts(path)
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        named = files.shown(architecture)
        raise _Unsupported(
            f"architecture {named} is not supported; only 'llama' GGUF files are read"
        )
    names = {tensor.name: _hf_name(tensor.name) for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in names)
    shapes = {names[t.name]: tuple(reversed(t.shape.tolist())) for t in reader.tensors}
    _check_tensors(reader, shapes, config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tokenizer, tokens = _tokenizer(fields), _special_names(fields)
    tensors = {}
    for tensor in tqdm.tqdm(reader.tensors, "reading the language model", disable=not progress):
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        place = tensor.name.split(".")[-2]
        if place in heads:
            weight = unpermute(weight, heads[place])
        tensors[names[tensor.name]] = weight
    return GgufLlama(
        tensors=tensors,
        config=config,
        tokenizer=tokenizer,
        tokens=tokens,
        chat_template=fields.get("tokenizer.chat_template"),
    )


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a type
_STRING, _ARRAY = 8, 9


def _check_counts(path: pathlib.Path) -> None:
    """Refuse counts beyond the end of the file, where the reader of `gguf` would continue."""
    size = path.stat().st_size
    with path.open("rb") as file:
        _, _, tensors, fields = struct.unpack("<4sIQQ", file.read(24))
        for _ in range(_bounded(fields, 13, file, size)):
            _skip(_STRING, file, size)
            (kind,) = struct.unpack("<I", file.read(4))
            _skip(kind, file, size)
        for _ in range(_bounded(tensors, 24, file, size)):
            _skip(_STRING, file, size)
            (axes,) = struct.unpack("<I", file.read(4))
            file.seek(8 * _bounded(axes, 8, file, size) + 12, io.SEEK_CUR)


def _skip(kind: int, file: io.BufferedReader, size: int) -> None:
    """Seek to the end of a value."""
    if kind in _SCALARS:
        file.seek(_SCALARS[kind], io.SEEK_CUR)
    elif kind == _STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(_bounded(length, 1, file, size), io.SEEK_CUR)
    elif kind == _ARRAY:
        of, count = struct.unpack("<IQ", file.read(12))
        if of in _SCALARS:
            file.seek(_SCALARS[of] * _bounded(count, _SCALARS[of], file, size), io.SEEK_CUR)
        elif of == _STRING:
            for _ in range(_bounded(count, 8, file, size)):
                _skip(of, file, size)
        else:
            raise ValueError(f"an array of type {of}")
    else:
        raise ValueError(f"a value of type {kind}")


def _bounded(count: int, each: int, file: io.BufferedReader, size: int) -> int:
    """Return a count of items of at least `each` bytes; refuse one that exceeds the file."""
    if count * each > size - file.tell():
        raise ValueError(f"it is cut short, or counts {count} where there are fewer")
    return count


def _check_tensors(
    reader: gguf.GGUFReader, found: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    """Refuse tensors that do not fit the config, or that do not follow each other in the file."""
    problems: list[str] = []
    decoder.read(config, problems)
    if problems:
        raise ValueError("; ".join(problems))
    wanted = _shapes(config)
    if wrong := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
        raise ValueError(f"tensors do not fit its fields: {files.some(wrong)}")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        if tensor.data_offset != -(-end // reader.alignment) * reader.alignment:
            raise ValueError(f"{tensor.name} does not follow the tensor before")
        end = int(tensor.data_offset) + int(tensor.n_bytes)
    if reader.data.size not in (end, -(-end // reader.alignment) * reader.alignment):
        raise ValueError(f"its tensors end at {end} and the file at {reader.data.size}")


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model by Hugging Face key."""
    V, D, F, H = (
        config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
    )
    q, kv = H * config["num_attention_heads"], H * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key weights with rows in the order of Hugging Face.

    GGUF interleaves the two halves of each head, for rotary embeddings of neighbouring pairs.
    Hugging Face rotates the first half against the second.

    Args:
        weight: float[heads * head_width, in].
        heads: the number of heads.
    """
    out, width = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(out, width))


def _hf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if block == "blk" and rest in _IN_LAYER:
        return f"model.layers.{layer}.{_IN_LAYER[rest]}"
    named = files.shown(name)
    raise _Unsupported(f"tensor {named} is not part of a llama model this reader knows")


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
    """Return the shortest decimal of a float32: 9.99999975e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _special_names(fields: dict[str, Any]) -> dict[str, str]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {hf: fields.get(f"tokenizer.ggml.{name}_token_id") for hf, name in names.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    return {f"{hf}_token": tokens[i] for hf, i in ids.items() if i is not None}


def _tokenizer(fields: dict[str, Any]) -> tokenizers.Tokenizer:
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        named = files.shown(kind)
        raise _Unsupported(f"tokenizer {named} is not supported; only ('gpt2', 'smollm') is")
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
