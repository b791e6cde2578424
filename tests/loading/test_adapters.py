"""Low-rank adapters against products written out in NumPy."""

from __future__ import annotations

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mllm_jax as mj
from mllm_jax.checkpoints import torch_file
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import model as llava
from mllm_jax.loading import load, save
from tests.helpers import damage, spellings, tiny

LM = "language_model.model.layers"
TARGETS = [f"{LM}.{n}.self_attn.{part}" for n in range(4) for part in ("q_proj", "v_proj")] + [
    f"{LM}.2.mlp.down_proj", "vision_tower.vision_model.encoder.layers.1.mlp.fc1",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(random_model):
    config = llava.LlavaConfig.of(
        llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95
    )
    return random_model(config)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    return save.save_hf(model, None, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def whole(base):
    """The tensors of the base, by the keys of the hub."""
    return safetensors.numpy.load_file(base / "model.safetensors")


def factors(whole, rank=lambda module: 3):
    rng = np.random.default_rng(1)
    found = {}
    for module in TARGETS:
        out, inside = whole[f"{module}.weight"].shape
        a, b = rng.normal(size=(rank(module), inside)), rng.normal(size=(out, rank(module)))
        found[module] = a.astype(np.float32), b.astype(np.float32)
    return found


def written(
    pairs, place, *, spelling="hub", suffix="safetensors", wrap="base_model.model.", **fields
):
    """An adapter as PEFT saves it."""
    place.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, pair in pairs.items():
        for letter, factor in zip("AB", pair, strict=True):
            named = spellings.spell({f"{module}.lora_{letter}.weight": factor}, spelling)
            tensors |= {wrap + key: value for key, value in named.items()}
    if suffix == "safetensors":
        safetensors.numpy.save_file(tensors, place / "adapter_model.safetensors")
    else:
        torch_file.write(tensors, place / "adapter_model.bin")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.05,
        "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
        "use_dora": False, "use_rslora": False, "layer_replication": None, "loftq_config": {},
    } | fields  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def expected(whole, pairs, scale):
    """w[o, i] += scale * sum over r of b[o, r] a[r, i], in float64."""
    merged = dict(whole)
    for module, (a, b) in pairs.items():
        change = sum(np.outer(b[:, r].astype(np.float64), a[r]) for r in range(len(a)))
        merged[f"{module}.weight"] = whole[f"{module}.weight"] + scale(module) * change
    return merged


def assert_merged(model, merged):
    """Every tensor of the model is that of the merged checkpoint."""
    found = {key: np.asarray(t) for key, t in save._tensors(model).items()}
    for key, value in found.items():
        np.testing.assert_allclose(value, merged[key], rtol=1e-6, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(("fields", "scale"), [
    ({}, lambda module: 2.0),
    ({"lora_alpha": 1.5}, lambda module: 0.5),
    ({"use_rslora": True}, lambda module: 6 / 3**0.5),
    ({"fan_in_fan_out": True}, lambda module: 2.0),  # PEFT takes no notice of it here either
    ({"alpha_pattern": {"q_proj": 12}}, lambda module: 4.0 if "q_proj" in module else 2.0),
    ({"alpha_pattern": {r"^.*\.x": 12}}, None),
])  # fmt: skip
def test_merged_weights(base, whole, tmp_path, fields, scale):
    pairs = factors(whole)
    place = written(pairs, tmp_path / "a", base_model_name_or_path=str(base), **fields)
    if scale is None:
        with pytest.raises(ValueError, match="alpha_pattern: .* only names of modules"):
            load.read_model(place)
        return
    assert_merged(load.read_model(place, dtype=jnp.float32), expected(whole, pairs, scale))


def test_ranks_that_differ(base, whole, tmp_path):
    def rank(module):
        return 5 if ".2." in module else 2 if module.endswith("fc1") else 3

    pairs = factors(whole, rank)
    pattern = {"fc1": 2, rf"^{LM}.2.mlp.down_proj": 5, r"layers\.2\.self_attn.q_proj": 5,
               "2.self_attn.v_proj": 5}  # fmt: skip
    place = written(pairs, tmp_path / "a", rank_pattern=pattern)
    found = load.read_model(place, base=base, dtype=jnp.float32)
    assert_merged(found, expected(whole, pairs, lambda module: 6 / rank(module)))


@pytest.mark.parametrize("spelling", ["hub", "transformers-5-memory", "original"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_spellings_and_formats(base, whole, tmp_path, spelling, suffix):
    pairs = factors(whole)
    place = written(pairs, tmp_path / "a", spelling=spelling, suffix=suffix)
    found = load.read_model(place, base=str(base), dtype=jnp.float32)
    assert_merged(found, expected(whole, pairs, lambda module: 2.0))


EMBEDDING, HEAD = "language_model.model.embed_tokens", "language_model.lm_head"


@pytest.mark.parametrize("default", ["", ".default"])
@pytest.mark.parametrize("kind", ["factors", "factors over the base", "whole", "saved"])
def test_embedding_and_head(base, whole, tmp_path, kind, default):
    """Factors of an embedding are [r, V] and [D, r]; whole tensors are those of modules_to_save."""
    rng, pairs, wrap = np.random.default_rng(2), factors(whole), "base_model.model."
    V, D = whole[f"{EMBEDDING}.weight"].shape
    a, b, new, head = (
        rng.normal(size=s).astype(np.float32) for s in ((3, V), (D, 3), (V, D), (V, D))
    )
    merged = expected(whole, pairs, lambda module: 2.0)
    if kind.startswith("factors"):
        more = {f"{EMBEDDING}.lora_embedding_{x}{default}": t for x, t in (("A", a), ("B", b))}
        change = sum(np.outer(a[r].astype(np.float64), b[:, r]) for r in range(3))
        table = whole[f"{EMBEDDING}.weight"]
        if "base" in kind:  # as PEFT saves the embedding where it is a target
            more |= {f"{EMBEDDING}.base_layer.weight": new}
            table = new
        merged[f"{EMBEDDING}.weight"] = table + 2.0 * change
    else:
        part = "" if kind == "whole" else f".modules_to_save{default}"
        more = {f"{EMBEDDING}{part}.weight": new, f"{HEAD}{part}.weight": head}
        merged |= {f"{EMBEDDING}.weight": new, f"{HEAD}.weight": head}
    place = written(pairs, tmp_path / "a", base_model_name_or_path=str(base))
    path = place / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path) | {wrap + key: t for key, t in more.items()}
    safetensors.numpy.save_file(tensors, path)
    assert_merged(load.read_model(place, dtype=jnp.float32), merged)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{EMBEDDING}.weight": (98, 32)}, r"another shape: .*embed_tokens.weight is \[98, 32\]"),
        ({f"{EMBEDDING}.lora_embedding_A": (3, 96)}, "embed_tokens: has lora_embedding_A alone"),
        ({f"{EMBEDDING}.lora_embedding_A": (3, 98), f"{EMBEDDING}.lora_embedding_B": (32, 3)},
         "embed_tokens: .* does not fit"),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, 32)}, "left over: .*tokens_delta"),
        ({f"{HEAD}.weight": (96, 32), f"{HEAD}.modules_to_save.weight": (96, 32)}, "same tensor"),
    ],
)  # fmt: skip
def test_other_tensors_of_adapters_are_refused_by_name(base, whole, tmp_path, tensors, says):
    place = written(factors(whole), tmp_path / "a", base_model_name_or_path=str(base))
    path = place / "adapter_model.safetensors"
    more = {f"base_model.model.{k}": np.ones(shape, np.float32) for k, shape in tensors.items()}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | more, path)
    with pytest.raises(ValueError, match=says) as refused:
        load.read_model(place)
    assert len(str(refused.value)) < 400


def test_a_llava_as_its_own_code_leaves_it(base, whole, tmp_path):
    """A config, adapters of a plain language model, and the projector in a file beside them."""
    fields = json.loads((base / "config.json").read_text())
    spellings.write_original(whole, fields, tmp_path / "o", torch_file.write)
    lm = {key: value for key, value in whole.items() if key.startswith("language_model.")}
    plain = tmp_path / "vicuna"
    plain.mkdir()
    safetensors.numpy.save_file(spellings.spell(lm, "original"), plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps({"model_type": "llama"}))
    pairs = {k: v for k, v in factors(whole).items() if k.startswith(LM)}
    place = written(
        pairs, tmp_path / "lora", spelling="original", suffix="bin",
        base_model_name_or_path="../vicuna",
    )  # fmt: skip
    (place / "config.json").write_bytes((tmp_path / "o" / "model" / "config.json").read_bytes())
    rng = np.random.default_rng(2)
    projector = {
        key: rng.normal(size=value.shape).astype(np.float32)
        for key, value in whole.items()
        if key.startswith("multi_modal_projector.")
    }
    beside = {f"base_model.model.{k}": v for k, v in spellings.spell(projector, "original").items()}
    torch_file.write(beside, place / "non_lora_trainables.bin")
    found = load.read_model(place, dtype=jnp.float32)
    merged = expected(whole | projector, pairs, lambda module: 2.0)
    assert_merged(found, merged)
    # The projector alone, from the same file, or from its folder.
    original = load.read_model(base, dtype=jnp.float32)
    for path in (place / "non_lora_trainables.bin", place):
        changed = mj.read_projector(original, path)
        assert_merged(changed, whole | projector)


@pytest.mark.parametrize("prefix", [
    "model.", "", "base_model.model.model.", "base_model.model.", "module.model.",
])  # fmt: skip
@pytest.mark.parametrize("names", ["mm_projector.{}.", "multi_modal_projector.linear_{}."])
def test_projector_keys_with_a_prefix(model, whole, tmp_path, prefix, names):
    numbers = (0, 2) if "mm_" in names else (1, 2)
    keys = {
        f"multi_modal_projector.linear_{n + 1}.{kind}": prefix + names.format(number) + kind
        for n, number in enumerate(numbers)
        for kind in ("weight", "bias")
    }
    torch_file.write({new: 2 * whole[old] for old, new in keys.items()}, tmp_path / "p.bin")
    found = mj.read_projector(model, tmp_path / "p.bin")
    assert_merged(found, whole | {old: 2 * whole[old] for old in keys})


def test_the_processor_is_that_of_the_base(base, whole, tmp_path):
    settings = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24},
        "crop_size": {"height": 24, "width": 24},
    }  # fmt: skip
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    tiny.tokenizer(llava.LlavaConfig.tiny()).save_pretrained(base)
    place = written(factors(whole), tmp_path / "a", base_model_name_or_path=str(base))
    model, processor = mj.load(place)
    batch = processor([tiny.picture(0, 24)], ["what is shown ?"])
    assert mj.run(model, batch).logits.shape == (1, 96)


@pytest.mark.parametrize(("fields", "says"), [
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only 'LORA'"),
    ({"peft_type": None}, "peft_type=None"),
    ({"bias": "all"}, "bias='all' is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"lora_alpha": "6"}, "lora_alpha='6'"),
    ({"r": 0}, "r=0"),
    ({"r": 4}, "of rank 4 does not fit"),
    ({"layer_replication": [[0, 4]]}, "unknown field layer_replication"),
    ({"alora_invocation_tokens": [1]}, "unknown field alora_invocation_tokens"),
    ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern.q_proj='x'"),
    ({"rank_pattern": {"(a+)+$": 3}}, "only names of modules"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path=5"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path=None"),
])  # fmt: skip
def test_other_adapters_are_refused_by_name(base, whole, tmp_path, fields, says):
    fields = {"base_model_name_or_path": str(base)} | fields
    place = written(factors(whole), tmp_path / "a", **fields)
    assert says in damage.refused(lambda: load.read_model(place), "adapter_")


def test_adapters_that_do_not_fit(base, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pairs = factors(whole)
    name, (a, b) = next(iter(pairs.items()))
    for change, says in (
        ({f"{LM}.9.self_attn.q_proj": (a, b)}, "the base model has no such tensor"),
        ({name: (a[:, :5], b)}, "does not fit"),
        ({name: (a.astype(np.int32), b)}, "is not floating-point"),
    ):
        place = written(pairs | change, tmp_path / "a")
        read = functools.partial(load.read_model, place, base=base)
        assert says in damage.refused(read, "adapter_model")
    tensors = safetensors.numpy.load_file(place / "adapter_model.safetensors")
    del tensors[f"base_model.model.{TARGETS[0]}.lora_B.weight"]
    safetensors.numpy.save_file(tensors, place / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has lora_A alone"):
        load.read_model(place, base=base)
    safetensors.numpy.save_file({"x": a}, place / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no tensor is named lora_A or lora_B"):
        load.read_model(place, base=base)
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has neither adapter_model.safetensors nor"):
        load.read_model(place, base=base)
    with pytest.raises(ValueError, match="base= needs a folder with adapter_config.json"):
        load.read_model(base, base=base)
    written(pairs, place, base_model_name_or_path="somebody/no-such-model")
    with pytest.raises(FileNotFoundError, match="adapter_config.json: base_model_name_or_path: "):
        load.read_model(place)


def test_canonical_keys():
    for key in ("base_model.model.model.mm_projector.0.weight", "mm_projector.0.weight"):
        assert llava_keys.canonical_key(key) == "multi_modal_projector.linear_1.weight"
    key = "base_model.model.model.layers.3.self_attn.q_proj.weight"
    assert llava_keys.canonical_key(key) == f"{LM}.3.self_attn.q_proj.weight"
