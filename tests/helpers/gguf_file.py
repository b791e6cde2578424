"""A tiny language model as a GGUF file."""

from __future__ import annotations

import gguf
import numpy as np
import tokenizers

WIDTH, MLP, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "he", "12"]
Q8_0, Q4_1 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter of llama.cpp does to query and key weights."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def weights() -> dict[str, np.ndarray]:
    """Random weights under their HF names."""
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (len(TOKENS), WIDTH), "model.norm.weight": (WIDTH,)}
    for n in range(LAYERS):
        layer = {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv, WIDTH),
            "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (MLP, WIDTH),
            "mlp.up_proj": (MLP, WIDTH),
            "mlp.down_proj": (WIDTH, MLP),
        }
        shapes |= {f"model.layers.{n}.{key}.weight": shape for key, shape in layer.items()}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def gguf_tensors(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights as a GGUF file has them."""
    names = {
        "embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for key, weight in hf.items():
        name = next(theirs for ours, theirs in names.items() if f"{ours}.weight" in key)
        block = f"blk.{key.split('.')[2]}." if ".layers." in key else ""
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
        tensors[f"{block}{name}.weight"] = permute(weight, heads) if heads else weight
    return tensors


def write(path, tensors, *, kind=None, arch="llama", pre="smollm"):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["h e", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, weight in tensors.items():
        if kind is not None and weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
