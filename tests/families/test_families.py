"""Checkpoints as transformers saves them are, once loaded, what transformers computes."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.interventions.shapes import site_shapes
from tests.helpers import families, hf, tiers, tiny

PICTURES = [
    [tiny.picture(0, 40, 60)],
    [tiny.picture(1, 90, 30), tiny.picture(2, 30, 30)],
    [],
    [tiny.picture(3, 9, 200)],
]
PROMPTS = ["<image> what is it ?", "<image> a <image> cat or dog ?", "yes no", "is <image> it"]
STEPS = 32
PADDED = tiers.slow_except(["left"], ["left", "right"])
# The families that the quick suite also saves, and lets generate.
QUICK = ("llava", "gemma3", "qwen2.5-vl")


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        takes_long = metafunc.function in (test_greedy_generation, test_save_hf)
        quick = QUICK if takes_long else families.ALL
        each = tiers.slow_except(quick, families.ALL | families.VARIANTS)
        metafunc.parametrize("family", each, indirect=True, scope="module")


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    make = (families.ALL | families.VARIANTS)[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(family):
    return mj.load(family.directory, dtype=jnp.float32)


@pytest.fixture(scope="module")
def batches(loaded):
    return {
        pad: loaded[1](PICTURES, PROMPTS, left=pad == "left", rows=5) for pad in ("left", "right")
    }


def theirs(family, network, batch):
    """Their logits."""
    with hf.torch.no_grad():
        given = family.inputs(batch, PICTURES)
        return network(**{k: hf.torch.from_numpy(v) for k, v in given.items()}).logits.numpy()


def test_config(family, loaded):
    assert loaded[0].config == family.config


@pytest.mark.parametrize("pad", PADDED)
def test_every_site(pad, family, loaded, batches):
    """From pictures of several shapes, several in a row, none in a row, and an empty row."""
    model, batch = loaded[0], batches[pad]
    assert not batch.is_real_tile.all()
    names = set(site_shapes(model, batch)) - {site.name for site in S.MASKS} - family.untold
    assert len(names) >= 20 + (family.config.projector.depth > 1)
    given = family.inputs(batch, PICTURES)
    want = hf.tensors(family.network, names, where=family.where, **given)
    for name in names:
        if name.startswith("vision.") and S.get(name).stacked:
            assert len(want[name]) == model.config.vision.layers
            want[name] = want[name][: model.config.vision.run_layers]
    hf.assert_equal(model, batch, family.placed(want, batch))


def continued(given, rows, tokens=None):
    """What their `generate` is given: the first rows, without positions, to so many tokens."""
    return {
        name: value[:rows, :tokens] if name.endswith(("_ids", "_mask")) else value
        for name, value in given.items()
        if name != "position_ids"
    }


@pytest.fixture(scope="module")
def greedy(family, batches):
    """Their greedy tokens. Theirs is always padded on the left: it cannot be otherwise."""
    rows = len(PROMPTS)
    given = continued(family.inputs(batches["left"], PICTURES), rows)
    family.network.generation_config.eos_token_id = None
    with hf.torch.no_grad():
        tokens = family.network.generate(
            **{k: hf.torch.from_numpy(v) for k, v in given.items()},
            max_new_tokens=STEPS, do_sample=False, pad_token_id=0,
        ).numpy()[:, -STEPS:]  # fmt: skip
    assert len({tuple(row) for row in tokens}) == rows and len(np.unique(tokens)) > 8
    return tokens


@pytest.mark.parametrize("pad", PADDED)
def test_greedy_generation(pad, loaded, batches, greedy):
    got = mj.generate(loaded[0], batches[pad], max_new_tokens=STEPS).tokens
    np.testing.assert_array_equal(np.asarray(got)[: len(PROMPTS)], greedy)


def test_the_layer_above_the_one_that_is_read(family, loaded, batches):
    """Theirs runs it for nothing; ours does not have it, and says so."""
    batch, at = batches["left"], family.config.vision.run_layers
    if at == family.config.vision.layers:
        pytest.skip("the last layer is read")
    before = theirs(family, family.network, batch)
    above = family.network.get_submodule("model.vision_tower.encoder.layers")[at].mlp
    hook = above.register_forward_hook(lambda module, args, out: out * 0 + 7)
    after = theirs(family, family.network, batch)
    hook.remove()
    np.testing.assert_array_equal(before, after)
    assert at == family.config.vision.layers - 1
    with pytest.raises(ValueError, match=r"layer 2 is out of range.*never reach the LM"):
        mj.run(loaded[0], batch, mj.ablate(S.vision.mlp.act[at]))


def test_save_hf(family, loaded, batches, tmp_path):
    model, processor = loaded
    saved = mj.save_hf(model, processor, tmp_path / "saved")
    back, report = type(family.network).from_pretrained(
        saved, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = (theirs(family, net, batches["left"]) for net in (family.network, back))
    real = batches["left"].valid
    np.testing.assert_allclose(after[real], before[real], rtol=0, atol=1e-6)
    again, same = mj.load(saved, dtype=jnp.float32)
    assert again.config == family.saved_config
    ours = (mj.run(m, batches["left"]).logits for m in (model, again))
    np.testing.assert_array_equal(*ours)
    np.testing.assert_array_equal(same(PICTURES, PROMPTS).ids, processor(PICTURES, PROMPTS).ids)
    if family.is_automatic:
        theirs_ = hf.transformers.AutoProcessor.from_pretrained(saved, backend="pil")
        assert type(theirs_) is type(family.processor)


@pytest.mark.slow
def test_bfloat16(family):
    """As near to float32 as transformers is in bfloat16."""
    model, processor = mj.load(family.directory, dtype=jnp.bfloat16)
    shapes = [(40, 60), (90, 30), (30, 30), (48, 48), (20, 90), (64, 48)]
    pictures = [[tiny.picture(10 + i, *shapes[i % 6])] for i in range(48)]
    batch = processor(pictures, ["<image> what is it ? a cat or dog or ship or tree"] * 48)
    given = {k: hf.torch.from_numpy(v) for k, v in family.inputs(batch, pictures).items()}
    half = type(family.network).from_pretrained(
        family.directory, dtype=hf.torch.bfloat16, attn_implementation="eager"
    )
    with hf.torch.no_grad():
        exact = family.network(**given).logits
        given["pixel_values"] = given["pixel_values"].bfloat16()
        theirs_ = half(**given).logits.float()
    ours = mj.run(model, batch, logits="all").logits
    exact, theirs_, ours = (
        hf.torch.log_softmax(hf.torch.tensor(np.asarray(x)), -1)[hf.torch.tensor(batch.valid)]
        for x in (exact, theirs_, ours)
    )
    assert len(exact) > 1000

    def far(x):
        """KL from float32, in nats, and the share of tokens of which another is likeliest."""
        kl = (exact.exp() * (exact - x)).sum(-1).mean()
        return np.array([kl, (exact.argmax(-1) != x.argmax(-1)).float().mean()])

    # Where logits differ by less than their rounding, which of two is likeliest says nothing.
    measures = 2 if exact.std(-1).mean() > 0.5 else 1
    assert (far(theirs_) > 0).all()
    assert (far(ours) <= 1.5 * far(theirs_))[:measures].all(), (far(ours), far(theirs_))


SHAPES = [(24, 24), (60, 40), (40, 60), (200, 8), (8, 200), (1, 100), (100, 1), (48, 48), (33, 77)]


def test_the_processor_is_theirs(family, loaded):
    """Ids, how often `<image>` is repeated, pixels."""
    processor = loaded[1]
    for number, shape in enumerate(SHAPES):
        two = [tiny.picture(number, *shape), tiny.picture(0, 60, 40)]
        for pictures, prompt in ((two, "<image> what <image> ?"), (two[:1], "<image> a cat")):
            text = prompt.replace("<image>", family.written)
            want = family.processor(images=pictures, text=text, return_tensors="np")
            batch = processor([pictures], [prompt])
            np.testing.assert_array_equal(batch.ids[batch.valid], want["input_ids"][0])
            pixels = want["pixel_values"]
            if family.config.pinpoints:
                counts = [x.tiles for x in processor.layouts([p.size[::-1] for p in pictures])]
                pixels = np.concatenate([v[:n] for v, n in zip(pixels, counts, strict=True)])
            given = family.inputs(batch, [pictures])
            np.testing.assert_array_equal(given["pixel_values"], pixels)
            compared = "attention_mask", "input_ids", "pixel_values"
            for name in (given.keys() & want.keys()).difference(compared):
                ours = given[name]
                ours = ours[batch.valid][None] if ours.shape == batch.ids.shape else ours
                np.testing.assert_array_equal(ours, want[name])


def skip_without_template(family):
    if getattr(family.processor, "chat_template", "") is None:
        pytest.skip("the released models have no chat template")


def read_chat(family, pictures, text: str) -> np.ndarray:
    """The ids of a rendered chat, without a second begin where the template writes one."""
    has_begin = text.startswith(family.processor.tokenizer.bos_token or " ")
    how = {"add_special_tokens": False} if has_begin else {}
    return family.processor(images=pictures, text=text, return_tensors="np", **how)["input_ids"][0]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_chat_template_is_theirs(images, family, loaded):
    parts = [{"type": "image"}] * images + [{"type": "text", "text": "what is it ?"}]
    turns = [{"role": "user", "content": parts}]
    skip_without_template(family)
    text = family.processor.apply_chat_template(turns, add_generation_prompt=True)
    pictures = [tiny.picture(i, 30, 40) for i in range(images)]
    want = read_chat(family, pictures or None, text)
    batch = loaded[1]([pictures], ["what is it ?"])
    np.testing.assert_array_equal(batch.ids[batch.valid], want)
    assert family.processor.tokenizer.decode(want).startswith(family.begins)
    asked = batch.ids[batch.tokens.kind == mj.tokens.CODE["question"]]
    assert loaded[1].tokenizer.convert_ids_to_tokens(asked) == ["what", "is", "it", "?"]


def test_chats_of_several_turns_are_theirs(family, loaded):
    """With a picture in each turn of the user, and with white space that the template keeps."""
    skip_without_template(family)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what is it ?\n"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "which ?"}, {"type": "image"}]},
    ]
    pictures = [tiny.picture(0, 30, 40), tiny.picture(1, 60, 30)]
    text = family.processor.apply_chat_template(chat, add_generation_prompt=True)
    want = read_chat(family, pictures, text)
    batch = loaded[1]([pictures], [chat])
    np.testing.assert_array_equal(batch.ids[batch.valid], want)
    asked = batch.ids[batch.tokens.kind == mj.tokens.CODE["question"]]
    said = loaded[1].tokenizer.convert_ids_to_tokens(asked)
    assert said == ["what", "is", "it", "?", *["\n"][family.trims :], "which", "?"]


@pytest.mark.slow
def test_it_stops_where_theirs_does(family, loaded):
    """At any id of generation_config.json."""
    at = family.directory / "generation_config.json"
    before = at.read_text()
    batch = loaded[1](PICTURES[:1], PROMPTS[:1])
    said = np.asarray(mj.generate(loaded[0], batch, max_new_tokens=6).tokens[0])
    try:
        at.write_text(json.dumps({"eos_token_id": [int(said[3]), 2]}))
        network = type(family.network).from_pretrained(
            family.directory, attn_implementation="eager"
        )
        processor = type(loaded[1]).from_directory(family.directory, family.config)
    finally:
        at.write_text(before)
    given = continued(family.inputs(batch, PICTURES[:1]), 1, batch.valid.sum())
    with hf.torch.no_grad():
        want = network.generate(
            **{k: hf.torch.from_numpy(v) for k, v in given.items()},
            max_new_tokens=6, do_sample=False, pad_token_id=0,
        )[0, batch.valid.sum() :]  # fmt: skip
    batch = processor(PICTURES[:1], PROMPTS[:1])
    got = mj.generate(loaded[0], batch, max_new_tokens=6, stop=True).tokens[0]
    assert want[-1] in processor.stop_ids
    np.testing.assert_array_equal(np.asarray(got)[: len(want)], want)
    assert (np.asarray(got)[len(want) :] == processor.stop_ids[0]).all()


def test_a_chat_template_wrapped_in_json(family, loaded, tmp_path):
    """As older checkpoints have it."""
    skip_without_template(family)
    family.processor.save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = type(loaded[1]).from_directory(tmp_path, family.config)
    assert processor.render("what ?", 1) == loaded[1].render("what ?", 1)
