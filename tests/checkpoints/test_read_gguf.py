from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.checkpoints import read_gguf
from tests.helpers.gguf_file import (
    HEADS,
    KV_HEADS,
    Q4_1,
    Q8_0,
    TOKENS,
    WIDTH,
    gguf_tensors,
    permute,
    weights,
    write,
)


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
