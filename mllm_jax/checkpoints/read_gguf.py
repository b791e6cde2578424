"""Read a GGUF file of a Llama or a Gemma 3: float32 arrays by Hugging Face key, and a tokenizer.

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
from flax import nnx

from mllm_jax import files
from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder
from mllm_jax.models.decoder import Decoder, DecoderConfig

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
_GEMMA_IN_LAYER = _IN_LAYER | {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_LAYER_NAMES = {"llama": _IN_LAYER, "gemma3": _GEMMA_IN_LAYER}
_LAYERS_OF_27B = 62  # its query_pre_attn_scalar is hidden_size / heads; no field has it
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF token types; control tokens are special


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufLlama:
    """The content of a GGUF file of a Llama or a Gemma 3, in the terms of Hugging Face.

    Attributes:
      tensors: float32 arrays by Hugging Face key; linear weights are [out, in].
      config: The fields of the `config.json`.
      tokenizer: The BPE tokenizer of the file, with its special tokens.
      tokens: The special tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
      chat_template: The chat template in Jinja; None if the file has none.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    tokens: dict[str, str]
    chat_template: str | None


def read(path: str | pathlib.Path, *, progress: bool = False) -> GgufLlama:
    """Read and dequantise a GGUF file of a Llama or a Gemma 3.

    Args:
      path: The `.gguf` file.
      progress: Whether to show a progress bar.

    Returns:
      The tensors, config, tokenizer and chat template.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: The file is not GGUF, is truncated, or has another architecture or tokenizer.
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
    """The file is valid GGUF of an unsupported model."""


def _read(path: pathlib.Path, progress: bool) -> GgufLlama:
    _check_counts(path)
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in _LAYER_NAMES:
        named = files.shown(architecture)
        raise _Unsupported(
            f"architecture {named} is not supported; only 'llama' and 'gemma3' GGUF files are read"
        )
    is_llama = architecture == "llama"
    names = {tensor.name: _hf_name(tensor.name, architecture) for tensor in reader.tensors}
    config = _config(fields, architecture, tied="output.weight" not in names)
    shapes = {names[t.name]: tuple(reversed(t.shape.tolist())) for t in reader.tensors}
    _check_tensors(reader, shapes, config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tokenizer, tokens = _tokenizer(fields), _special_names(fields)
    tensors = {}
    for tensor in tqdm.tqdm(reader.tensors, "reading the language model", disable=not progress):
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        place = tensor.name.split(".")[-2]
        if is_llama and place in heads:
            weight = unpermute(weight, heads[place])
        if not is_llama and place.endswith("norm"):
            weight = weight - 1  # GGUF stores the factor of a norm, Gemma's own files factor - 1
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
        raise ValueError(f"it is truncated, or states {count} items but has fewer")
    return count


def _check_tensors(
    reader: gguf.GGUFReader, found: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    """Refuse tensors that do not fit the config, or that do not follow each other in the file."""
    problems: list[str] = []
    decoder.read(config, problems)
    if problems:
        raise ValueError("; ".join(problems))
    wanted = _shapes(decoder.config(decoder.read(config, problems)))
    if wrong := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
        raise ValueError(f"tensors do not fit its fields: {files.some(wrong)}")
    end = reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        if tensor.data_offset != -(-end // reader.alignment) * reader.alignment:
            raise ValueError(f"{tensor.name} does not follow the tensor before")
        end = int(tensor.data_offset) + int(tensor.n_bytes)
    if reader.data.size not in (end, -(-end // reader.alignment) * reader.alignment):
        raise ValueError(f"its tensors end at {end} and the file at {reader.data.size}")


def parameter_shapes(lm: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a language model by their path in this library."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(lm, rngs=nnx.Rngs(0))))
    return {
        ".".join(("lm", *map(str, path))): leaf.shape for path, leaf in nnx.to_flat_state(state)
    }


def _shapes(lm: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model by Hugging Face key."""
    slots = keys.slots(parameter_shapes(lm), decoder.table(lm, "model", "lm_head"))
    return {slot.key: slot.shape for slot in slots}


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key weights with rows in the order of Hugging Face.

    GGUF interleaves the two halves of each head, for rotary embeddings of neighbouring pairs.
    Hugging Face rotates the first half against the second.

    Args:
      weight: float[heads * head_width, in].
      heads: The number of heads.
    """
    out, width = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(out, width))


def _hf_name(name: str, architecture: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    known = _LAYER_NAMES[architecture]
    if block == "blk" and rest in known:
        return f"model.layers.{layer}.{known[rest]}"
    named = files.shown(name)
    raise _Unsupported(f"tensor {named} is not part of a {architecture} model this reader knows")


def _config(fields: dict[str, Any], architecture: str, tied: bool) -> dict[str, Any]:
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in fields.items()
        if key.startswith(f"{architecture}.")
    }
    width, heads = own["embedding_length"], own["attention.head_count"]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": own.get("attention.key_length", width // heads),
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(own.get("rope.freq_base", 10000.0)),
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture == "llama":
        return config | {"hidden_act": "silu", "mlp_bias": False}
    is_27b = own["block_count"] == _LAYERS_OF_27B
    scaling = {"rope_type": "linear", "factor": _decimal(own.get("rope.scaling.factor", 1.0))}
    return config | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": own["attention.sliding_window"],
        "query_pre_attn_scalar": width // heads if is_27b else config["head_dim"],
        "rope_theta": _decimal(own.get("rope.freq_base", 1e6)),
        "rope_scaling": None if scaling["factor"] == 1 else scaling,
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
    if kind == ("llama", "default") and "tokenizer.ggml.scores" in fields:
        return _sentencepiece(fields)
    if kind != ("gpt2", "smollm"):
        named = files.shown(kind)
        raise _Unsupported(
            f"tokenizer {named} is not supported; only ('gpt2', 'smollm') and ('llama', 'default')"
        )
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


def _sentencepiece(fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the BPE of a SentencePiece vocabulary, whose scores order the merges."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    types = fields["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    order = sorted(
        (i for i, kind in enumerate(types) if kind == _NORMAL), key=lambda i: (-scores[i], i)
    )
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in order
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in vocab and tokens[i][cut:] in vocab
    ]
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, types, strict=True) if its == kind]
        tokenizer.add_tokens(
            [tokenizers.AddedToken(token, special=special, normalized=False) for token in added]
        )
    if fields.get("tokenizer.ggml.add_bos_token", True):
        first = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return tokenizer
