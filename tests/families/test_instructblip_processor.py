"""InstructBLIP's batches: pictures first, the question told to the Q-Former and to the LM."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import transformers

import mllm_jax as mj
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.instructblip.processor import InstructBlipProcessor
from tests.helpers import tiny

TINY = InstructBlipConfig.tiny()
TURNS = [
    [("what is shown ?", "a cat"), ("which ?", "red"), ("is it small or large ?", "no")],
    [("which one ?", "blue")],
]


@pytest.fixture(scope="module")
def processor():
    return tiny.instructblip_processor(TINY)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(TINY)


@pytest.fixture(scope="module")
def features():
    shape = (2, TINY.vision.feature_tokens, TINY.vision.width)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def letters(kind: np.ndarray) -> str:
    """One letter a token: Pad, System, Question, Image, Answer."""
    return "".join("PSQINA.."[k] for k in kind)


def words(tokenizer, ids, kind) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids[kind > 0])


def test_pictures_then_text_and_the_question_twice(processor):
    batch = processor([tiny.picture(0)], [" what is shown ? "])
    kind = batch.tokens.kind[0]
    text = ["<s>", "what", "is", "shown", "?"]
    assert words(processor.tokenizer, batch.ids[0], kind) == ["<image>"] * 5 + text
    assert letters(kind).rstrip("P") == "IIIIISQQQQ"
    told = ["[CLS]", "what", "is", "shown", "?", "[SEP]"]
    ids, kind = batch.qformer_ids[0], batch.qformer_kind[0]
    assert words(processor.qformer_tokenizer, ids, kind) == told
    assert letters(kind).rstrip("P") == "SQQQQS" and not ids[6:].any()
    assert batch.last.tolist() == [9]
    np.testing.assert_array_equal(batch.image_token_index[0, :6], [0, 1, 2, 3, 4, -1])
    np.testing.assert_array_equal(batch.position[0, :10], np.arange(10))
    for name, at in {"row": -1, "column": -1, "tile": 0}.items():
        np.testing.assert_array_equal(getattr(batch.tokens, name)[0, :5], [at] * 5)
    assert batch.segment is None and batch.labels is None and batch.processor is processor


@pytest.mark.parametrize("prompt", ["what is it ?\n", "\n what ? ", "a cat", "", " "])
def test_ids_are_those_of_transformers(prompt, processor):
    """White space included, in both texts."""
    theirs = transformers.InstructBlipProcessor(
        transformers.BlipImageProcessorPil(size={"height": 24, "width": 24}),
        processor.tokenizer, processor.qformer_tokenizer, num_query_tokens=TINY.qformer.queries,
    )  # fmt: skip
    want = theirs(images=tiny.picture(0), text=prompt)
    batch = processor([tiny.picture(0)], [prompt])
    np.testing.assert_array_equal(batch.ids[batch.valid], np.ravel(want["input_ids"]))
    told = batch.qformer_ids[0][batch.qformer_kind[0] > 0]
    np.testing.assert_array_equal(told, np.ravel(want["qformer_input_ids"]))


def test_a_picture_may_be_named_first(processor):
    a, b = (processor([tiny.picture(0)], [text]) for text in ("<image>what ?", "what ?"))
    for name in ("ids", "qformer_ids", "qformer_kind"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    empty = processor([tiny.picture(0)], ["<image>"])
    assert letters(empty.tokens.kind[0]).rstrip("P") == "IIIIIS"
    assert letters(empty.qformer_kind[0]).rstrip("P") == "SS"


def test_into_a_chat_template():
    processor = tiny.instructblip_processor(TINY, tiny.TEMPLATE)
    batch = processor([tiny.picture(0)], ["what ?"])
    assert letters(batch.tokens.kind[0]).rstrip("P") == "IIIII" + "SSS" + "QQ" + "SSSSS"
    assert letters(batch.qformer_kind[0]).count("Q") == 2  # the question is the same part there


def test_several_pictures_and_none(processor):
    pictures = [[tiny.picture(0), tiny.picture(1)], [], tiny.picture(2)]
    batch = processor(pictures, ["what ?", "yes", "<image>which is it ?"], rows=4)
    assert [letters(kind).rstrip("P") for kind in batch.tokens.kind] == [
        "IIIII" * 2 + "SQQ", "SQ", "IIIII" + "SQQQQ", ""
    ]  # fmt: skip
    np.testing.assert_array_equal(batch.is_real_tile, [1, 1, 0, 0, 1, 0, 0, 0])
    told = [letters(kind).rstrip("P") for kind in batch.qformer_kind]
    assert told == ["SQQS", "SQQS", "", "", "SQQQQS", "", "", ""]
    np.testing.assert_array_equal(batch.tokens.tile[0, :10], [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(batch.image_token_index[2, :5], 4 * 5 + np.arange(5))
    alone = processor(None, ["yes"])
    assert not len(alone.is_real_tile) and not len(alone.qformer_ids)


def test_answers_left_and_right(processor):
    right, left = (
        processor([tiny.picture(0)] * 2, ["which ?", "what is it ?"], answers=["a cat", "no"],
                  left=left)
        for left in (False, True)
    )  # fmt: skip
    assert letters(right.tokens.kind[0]).rstrip("P") == "IIIIISQQAAA"
    assert letters(left.tokens.kind[1]).lstrip("P") == "IIIIISQQQQAA"
    np.testing.assert_array_equal(right.labels[0, :4], [8, 9, 10, -1])
    assert right.last.tolist() == [7, 9] and left.last.tolist() == [28, 29]
    np.testing.assert_array_equal(right.qformer_ids, left.qformer_ids)


def test_packed_each_question_has_a_picture_of_its_own(processor, model, features):
    """As it was read for this question; each is answered as it is alone."""
    packed = processor.pack(None, TURNS, features=features, rows=3, length=64)
    first, second, third = ("IIIIIS" + asked for asked in ("QQQQAAA", "QQAA", "QQQQQQAA"))
    assert letters(packed.tokens.kind[0]).rstrip("P") == first + second + third
    sizes = [len(part) for part in (first, second, third)]
    np.testing.assert_array_equal(packed.segment[0, : sum(sizes)], np.repeat([1, 2, 3], sizes))
    want = np.concatenate([np.arange(n) for n in sizes])
    np.testing.assert_array_equal(packed.position[0, : sum(sizes)], want)
    np.testing.assert_array_equal(packed.is_real_tile, [1, 1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(packed.features[:4], features[[0, 0, 0, 1]])
    assert packed.last.tolist()[:2] == [9, 8] and not packed.valid[2].any()

    rows = [(row, segment, pair) for row, pairs in enumerate(TURNS)
            for segment, pair in enumerate(pairs, 1)]  # fmt: skip
    alone = processor(
        None,
        [question for _, _, (question, _) in rows],
        answers=[answer for _, _, (_, answer) in rows],
        features=features[[row for row, _, _ in rows]],
    )
    together, apart = (np.asarray(mj.run(model, b, logits="all").logits) for b in (packed, alone))
    for number, (row, segment, _) in enumerate(rows):
        here, there = packed.segment[row] == segment, alone.valid[number]
        np.testing.assert_allclose(together[row, here], apart[number, there], rtol=0, atol=1e-5)


def test_packed_pictures(processor):
    batch = processor.pack([tiny.picture(0), tiny.picture(1)], TURNS)
    np.testing.assert_array_equal(batch.pixels[0], batch.pixels[2])
    assert batch.is_real_tile.tolist() == [True] * 4 + [False] * 2
    assert np.abs(batch.pixels[3] - batch.pixels[0]).max() > 0.1


@pytest.mark.slow
def test_generate_and_score(processor, model):
    """A prompt that is continued by its best answer scores it best."""
    batch = processor([tiny.picture(0), tiny.picture(1)], ["what is it ?", "which ?"], rows=3)
    said = mj.generate(model, batch, max_new_tokens=3)
    assert len(said.text) == 3 and said.text[2] == ""
    best = np.asarray(said.tokens)[:, None]
    other = np.where(best == 7, 8, 7)
    scores = np.asarray(mj.score(model, batch, np.concatenate([best, other], 1)))
    assert (scores[:2, 0] > scores[:2, 1]).all()
    named = mj.score(model, batch, ["a cat", "no"])
    assert named.shape == (3, 2) and np.isfinite(named[:2]).all()


def test_a_checkpoint_without_an_image_token(processor, model):
    """Of 2023: the places of pictures hold no id at all, and nothing else is different."""
    old = tiny.instructblip_processor(TINY)
    old.config = dataclasses.replace(TINY, image_token=-1)
    a, b = (p([tiny.picture(0)], ["what is it ?"]) for p in (processor, old))
    assert (b.ids[0, :5] == -1).all()
    np.testing.assert_array_equal(a.ids[0, 5:], b.ids[0, 5:])
    np.testing.assert_array_equal(mj.run(model, a).logits, mj.run(model, b).logits)


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        (1, "what <image> ?", "does not begin with one <image> for each of 1 pictures: InstructBLIP"),
        (2, "<image>what ?", "the prompt '<image>what .' does not begin with one .* of 2 pictures"),
        (0, "<image>what ?", "for each of 0 pictures"),
        (1, "yes " * 39, "the prompt has 41 tokens for the Q-Former, which reads 40 at most: 'yes yes"),
    ],
)  # fmt: skip
def test_errors(images, prompt, message, processor):
    with pytest.raises(ValueError, match=message):
        processor([[tiny.picture(0)] * images], [prompt])


def test_a_checkpoint_without_the_second_tokenizer(processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"qformer_tokenizer has neither tokenizer.json nor"
    ):
        InstructBlipProcessor.from_directory(tmp_path, TINY)
    processor.qformer_tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
    back = InstructBlipProcessor.from_directory(tmp_path, TINY)
    a, b = (p(None, ["what is it ?"]) for p in (processor, back))
    np.testing.assert_array_equal(a.ids, b.ids)
