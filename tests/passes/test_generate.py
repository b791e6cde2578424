"""Cached generation is recomputation, with edits; it stops, and it samples by its key."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.tap import Taps
from mllm_jax.models.cache import Cache
from mllm_jax.passes import generate
from mllm_jax.sharding import memory
from tests.helpers import cases
from tests.helpers.longer import continued, places

STEPS = 32
SEEN: list[np.ndarray] = []


def record(x):
    """An edit that changes nothing, and remembers the logits that it was given."""
    jax.debug.callback(lambda x: SEEN.append(np.asarray(x)), x, ordered=True)
    return x


def edited(case: str) -> Edits:
    """All these are of one structure, so that generation is compiled once."""
    return cases.CASES[case] >> mj.call(S.logits, record)


@pytest.fixture(scope="module")
def prompts(make_batch):
    return {pad: make_batch(pad=pad, length=16) for pad in ("left", "right")}


@pytest.fixture(scope="module")
def clean(tiny_model, prompts):
    return np.asarray(mj.generate(tiny_model, prompts["right"], edited("nothing")).tokens)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("case", cases.CASES)
def test_cached_is_recomputed(case, pad, tiny_model, prompts, clean):
    batch, edits = prompts[pad], edited(case)
    SEEN.clear()
    out = mj.generate(tiny_model, batch, edits, max_new_tokens=STEPS)
    jax.effects_barrier()
    said, seen = np.asarray(out.tokens), list(SEEN)
    assert said.shape == (2, STEPS) and out.text is None
    assert np.array_equal(said, clean) == (case == "nothing")  # else it would show nothing
    assert_recomputed(tiny_model, batch, out, seen, edits)


def test_separate_layers_are_recomputed(tiny_model, prompts, monkeypatch):
    """As a GPU with enough memory decodes."""
    read = []
    own = type(tiny_model.lm).layers_one_by_one
    monkeypatch.setattr(
        type(tiny_model.lm), "layers_one_by_one", lambda lm: read.append(1) or own(lm)
    )
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**30})
    monkeypatch.setattr(memory, "first_device", lambda model: gpu)
    batch, edits = prompts["left"], edited("add last and answer")
    SEEN.clear()
    out = mj.generate(tiny_model, batch, edits, max_new_tokens=generate.SEPARATE_STEPS)
    jax.effects_barrier()
    assert read
    assert_recomputed(tiny_model, batch, out, list(SEEN), edits)


@pytest.mark.parametrize(
    ("separate", "platform", "rows", "steps", "weights", "cache", "free"),
    [
        (True, "gpu", 8, 16, 100, 20, 280),
        (True, "cuda", 1, 16, 100, 20, 280),
        (False, "gpu", 8, 15, 100, 20, 280),
        (False, "gpu", 8, 16, 100, 20, 279),
        (False, "gpu", 8, 16, 100, 20, None),
        (False, "tpu", 1, 64, 100, 20, 2**40),
        (True, "cpu", 1, 16, 2**31, 20, None),
        (False, "cpu", 2, 64, 100, 20, None),
        (False, "cpu", 1, 64, 2**31 + 1, 20, None),
    ],
)
def test_when_layers_are_separate(separate, platform, rows, steps, weights, cache, free):
    found = generate.separates_layers(platform, rows, steps, weights, cache, free)
    assert found == separate


def test_the_bytes_of_a_cache(tiny_model, prompts):
    cache = tiny_model(prompts["left"], Taps())[1]
    (rows, slots), dtype = prompts["left"].ids.shape, cache.key.dtype
    found = Cache.bytes_on_device(tiny_model.config.lm, rows, slots, dtype)
    assert found == cache.key.nbytes + cache.value.nbytes


def test_traced_layers_are_stacked(tiny_model, prompts, monkeypatch):
    monkeypatch.setattr(memory, "first_device", None)  # tracers have no device
    steps = generate.SEPARATE_STEPS
    out = jax.eval_shape(
        lambda m: mj.generate(m, prompts["left"], max_new_tokens=steps).tokens, tiny_model
    )
    assert out.shape == (2, steps)


def assert_recomputed(model, batch, out, seen, edits):
    """What was said and reported is that of one pass over all that was read, with `edits`."""
    said = np.asarray(out.tokens)
    assert len(seen) == said.shape[1]  # one pass a token, and none after the last
    want = mj.run(model, continued(batch, said[:, :-1]), edits, logits="all")
    for row, at in enumerate(places(batch, said)):
        logits = np.stack([x[row, 0] for x in seen])
        np.testing.assert_allclose(logits, want.logits[row, at], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(said[row], logits.argmax(-1))
    for ours, theirs in zip(out.receipts, want.receipts, strict=True):
        assert ours.edit == theirs.edit
        if ours.edit == "call logits":  # the last pass has one position a row, the whole has all
            continue
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.elements, theirs.elements)
        np.testing.assert_allclose(ours.norm, theirs.norm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", [pytest.param("right", marks=pytest.mark.slow), "left"])
def test_strengths_by_step_and_values_by_token(pad, tiny_model, prompts, clean):
    """Step 0 is the prompt's; the last strength and the value at the last token hold on."""
    batch = prompts[pad]
    strengths, value = cases.STRENGTHS, cases.by_token(batch)
    SEEN.clear()
    edits = cases.stepped(strengths, value) >> mj.call(S.logits, record)
    out = mj.generate(tiny_model, batch, edits, max_new_tokens=8)
    jax.effects_barrier()
    seen = list(SEEN)
    assert not np.array_equal(out.tokens, clean[:, :8])
    longer = continued(batch, np.asarray(out.tokens)[:, :-1])
    value = cases.carried(batch, longer, value)
    again = cases.stepped(strengths, value)
    by_hand = cases.stepped_by_hand(longer, strengths, value)
    assert_recomputed(tiny_model, batch, out, seen, again >> mj.call(S.logits, record))
    a, b = (mj.run(tiny_model, longer, e, logits="all").logits for e in (again, by_hand))
    np.testing.assert_allclose(a[longer.valid], b[longer.valid], rtol=0, atol=1e-5)


def test_a_mask_of_the_prompt_means_the_prompt(tiny_model, prompts):
    batch = prompts["right"]
    steer = mj.add(S.lm.resid_post[1], cases.V, where=tok.question & tok.mask(batch.tokens.last))
    same = mj.add(S.lm.resid_post[1], cases.V, where=tok.last)
    a, b = (mj.generate(tiny_model, batch, e, max_new_tokens=4) for e in (steer, same))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.receipts[0].tokens, [0, 2, 0, 0])
    with pytest.raises(ValueError, match=r"mask is \(2, 9\), but the batch has tokens \(2, 16\)"):
        mj.generate(tiny_model, batch, mj.ablate(S.lm.embed, where=np.ones((2, 9), bool)))


@dataclasses.dataclass(frozen=True, eq=False)
class Stub:
    """What generation needs of a processor."""

    stop_ids: np.ndarray

    def text(self, ids, *, stop):
        return [f"{stop} {' '.join(map(str, row))}" for row in np.asarray(ids)]


def test_a_row_stops_at_its_stop_token(tiny_model, prompts, clean):
    at = 5
    stop = clean[1, at]  # where row 1 stops, at the latest; row 0 may say it too
    first = [list(row).index(stop) if stop in row else STEPS - 1 for row in clean]
    assert first[1] <= at and first[0] != first[1]
    processor = Stub(np.array([stop], np.int32))
    batch = prompts["right"].replace(processor=processor)
    out = mj.generate(tiny_model, batch, edited("nothing"), stop=True)
    for row, end in enumerate(first):
        np.testing.assert_array_equal(out.tokens[row, : end + 1], clean[row, : end + 1])
        np.testing.assert_array_equal(out.tokens[row, end + 1 :], stop)
    assert out.text == processor.text(out.tokens, stop=True)
    # what a row did after its end, while others went on, is not in the receipt
    words = 15 + 12 + sum(first)  # the last token said is not read
    np.testing.assert_array_equal(out.receipts[0].tokens, [0, words, words, 0])
    with pytest.raises(ValueError, match="stop=True needs a batch made by a processor"):
        mj.generate(tiny_model, prompts["right"], stop=True)


def test_rows_do_not_depend_on_each_other(tiny_model, prompts, make_batch):
    batch, other = prompts["right"], make_batch(length=16, seed=3)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), batch, other)
    a, b, c = (
        np.asarray(mj.generate(tiny_model, x, edited("ablate answer")).tokens)
        for x in (batch, other, mixed)
    )
    np.testing.assert_array_equal(c, [a[0], b[1]])


def test_a_row_that_only_fills_the_batch_says_nothing(tiny_model, prompts, clean):
    batch, real = prompts["right"], np.array([[True], [False]])
    empty = dataclasses.replace(
        batch.tokens, kind=batch.tokens.kind * real, last=batch.tokens.last & real
    )
    out = mj.generate(tiny_model, batch.replace(tokens=empty), edited("nothing"))
    np.testing.assert_array_equal(out.tokens[0], clean[0])
    np.testing.assert_array_equal(out.tokens[1], -1)
    np.testing.assert_array_equal(out.receipts[0].tokens, np.array([0, 1, 1, 0]) * (15 + STEPS - 1))


def test_samples_are_by_their_key_and_have_the_models_probabilities(tiny_model, make_batch):
    batch = make_batch(images=(0,) * 256, words=(5,) * 256)
    batch.ids[:] = batch.ids[0]
    logits = np.asarray(mj.run(tiny_model, batch).logits[0], np.float64)

    def sampled(temperature, seed):
        how = {"temperature": temperature, "key": jax.random.key(seed)}
        return np.asarray(mj.generate(tiny_model, batch, max_new_tokens=2, **how).tokens)

    np.testing.assert_array_equal(sampled(1.0, 0), sampled(1.0, 0))
    assert (sampled(1.0, 0) != sampled(1.0, 1)).any((0, 1))
    assert (sampled(1e-4, 0)[:, 0] == logits.argmax()).all()
    for temperature in (1.0, 0.3):
        want = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        first = [sampled(temperature, seed)[:, 0] for seed in range(10)]
        share = np.bincount(np.ravel(first), minlength=96) / np.size(first)
        assert abs(share - want).sum() / 2 < 0.12  # 2560 draws of 96 words


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 is not a finite number from 0"),
        ({"temperature": float("nan")}, "temperature=nan is not a finite number from 0"),
        ({"temperature": float("inf")}, "temperature=inf is not a finite number from 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not a whole number from 1"),
        (
            {"edits": mj.add(S.lm.attn.pattern, np.ones((4, 15, 15)))},
            "add lm.attn.pattern: a value with the axis S gives one number for each key of the prompt",
        ),
        ({"temperature": 1.0}, r"sampling needs one key: key=jax.random.key\(seed\)"),
    ],
)
def test_errors(how, message, tiny_model, make_batch):
    with pytest.raises(ValueError, match=message):
        mj.generate(tiny_model, make_batch(), **how)


def test_a_prompt_has_no_answer_yet(tiny_model, make_batch):
    """Which generation reaches; for a pass over the prompt alone it is an error."""
    with pytest.raises(ValueError, match="selects no token"):
        mj.run(tiny_model, make_batch(), mj.add(S.lm.resid_post[1], 1.0, where=tok.answer))
