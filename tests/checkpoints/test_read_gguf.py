from __future__ import annotations

import gguf
import numpy as np
import pytest
import tokenizers

from mllm_jax.checkpoints import read_gguf

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return read_gguf.read(write(path, gguf_tensors(weights())))


def test_weights_come_back_under_hf_names(llama):
    expected = weights()
    assert llama.tensors.keys() == expected.keys()
    for key, weight in expected.items():
        np.testing.assert_array_equal(llama.tensors[key], weight, err_msg=key)


@pytest.mark.parametrize("kind, steps", [(Q8_0, 127), (Q4_1, 7.5)])
def test_quantised_weights_are_within_half_a_step(tmp_path, kind, steps):
    hf = weights()
    read = read_gguf.read(write(tmp_path / "q.gguf", gguf_tensors(hf), kind=kind)).tensors
    for key, weight in hf.items():
        assert read[key].dtype == np.float32
        # One step of a block is at most its largest magnitude / steps; scales are float16.
        bound = 0.51 * np.abs(weight).max() / steps if weight.ndim == 2 else 0
        assert np.abs(read[key] - weight).max() <= bound, key


def test_config_in_hf_terms(llama):
    config = llama.config
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["head_dim"] == WIDTH // HEADS
    assert config["rms_norm_eps"] == 1e-5  # not 9.999999747378752e-06
    assert config["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"]
    assert llama.tokens["eos_token"] == "<|im_end|>"
    assert llama.chat_template == "{{ messages }}"


def test_untied_head(tmp_path):
    hf = weights()
    head = np.ones((len(TOKENS), WIDTH), np.float32)
    tensors = gguf_tensors(hf) | {"output.weight": head}
    llama = read_gguf.read(write(tmp_path / "untied.gguf", tensors))
    assert not llama.config["tie_word_embeddings"]
    np.testing.assert_array_equal(llama.tensors["lm_head.weight"], head)


def test_tokenizer(llama):
    ids = llama.tokenizer.encode("<|im_start|>hehe 12<|im_end|>").ids
    pieces = [TOKENS[i] for i in ids]
    # Digits stand alone, so the merge "1 2" never applies; the others do.
    assert pieces == ["<|im_start|>", "he", "he", "Ġ", "1", "2", "<|im_end|>"]
    for text in ("héllo 世界 🎉", "a\n\tb  c", "3.14159"):
        assert llama.tokenizer.decode(llama.tokenizer.encode(text).ids) == text


def test_unpermute_inverts_the_converter():
    weight = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    assert not np.array_equal(permute(weight, 2), weight)
    np.testing.assert_array_equal(read_gguf.unpermute(permute(weight, 2), 2), weight)


def test_bad_files(tmp_path):
    text = tmp_path / "text.gguf"
    text.write_bytes(b"not a model at all" * 10)
    with pytest.raises(ValueError, match=r"text.gguf: not a readable GGUF"):
        read_gguf.read(text)
    whole = write(tmp_path / "whole.gguf", gguf_tensors(weights())).read_bytes()
    for size in (20, 5000, len(whole) - 100):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.gguf: not a readable GGUF"):
            read_gguf.read(cut)
    with pytest.raises(ValueError, match="architecture 'qwen2' is not supported"):
        read_gguf.read(write(tmp_path / "qwen.gguf", {}, arch="qwen2"))
    with pytest.raises(ValueError, match=r"tokenizer .*'llama-bpe'.* is not supported"):
        tensors = gguf_tensors(weights())
        read_gguf.read(write(tmp_path / "pre.gguf", tensors, pre="llama-bpe"))
    with pytest.raises(ValueError, match=r"'rope_freqs.weight' is not part of a llama model"):
        tensors = gguf_tensors(weights()) | {"rope_freqs.weight": np.ones(8, np.float32)}
        read_gguf.read(write(tmp_path / "freqs.gguf", tensors))
