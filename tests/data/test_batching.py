"""Batches are always the same at the same place, and of one shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import PIL.Image
import pytest

from mllm_jax.data import batching
from mllm_jax.families.llava_next import model as llava_next
from tests.helpers import study_checkpoints, tiny


@dataclasses.dataclass(frozen=True)
class Question:
    style: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    id: str
    image: PIL.Image.Image
    questions: tuple[Question, ...]
    domain: str = "things"


WHAT = Question("kind", "what is shown ?", "a cat", ("a dog", "a cat"))
YES = Question("yesno", "is it a cat ?", "yes", ("yes", "no"))
NO = Question("yesno", "is it a large red dog ?", "no", ("yes", "no"))
EXAMPLES = tuple(
    Example(str(i), tiny.picture(i), asked)
    for i, asked in enumerate([(WHAT, YES, NO), (WHAT, YES), (WHAT, NO), (WHAT,), (NO, YES)])
)


@pytest.fixture(scope="module")
def processor(tiny_config):
    return tiny.processor(tiny_config)


def test_interleaved_lists_are_spread_evenly():
    mixed = batching.interleave(["aaaaaa", "bb", "c", ""])
    assert sorted(mixed) == list("aaaaaabbc")
    assert "".join(mixed) == "aabacaaba"
    assert batching.interleave([]) == []


def packed(processor, **how):
    features = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((1, 16, 32), np.float32)
    how = {"size": 2, "steps": 10, "questions": 2, "seed": 1} | how
    return batching.PackedQuestions(processor, EXAMPLES, features, **how)


def which(batch) -> list[int]:
    """The examples of a batch, by their features."""
    return batch.features[:, 0, 0].astype(int).tolist()


def said(batch, row) -> set[str]:
    text = batch.processor.text(batch.ids[[row]][:, batch.tokens.kind[row] == 5], stop=False)
    return text[0]


def test_every_epoch_reads_every_example_once_in_another_order(processor):
    lessons = packed(processor)
    read = [i for step in range(10) for i in which(lessons[step])]
    epochs = [read[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(lessons) == 10


def test_the_same_place_is_the_same_batch(processor):
    a, b, other = packed(processor), packed(processor), packed(processor, seed=2)
    for step in (7, 0):
        for name in ("ids", "features", "segment", "labels"):
            np.testing.assert_array_equal(getattr(a[step], name), getattr(b[step], name))
    assert any(which(a[step]) != which(other[step]) for step in range(10))


def test_all_batches_have_one_shape(processor):
    lessons = packed(processor)
    shapes = {(b.ids.shape, b.features.shape) for b in map(lessons.__getitem__, range(10))}
    assert len(shapes) == 1
    widest = processor.pack(None, [[("is it a large red dog ?", "no"), ("what is shown ?", "a cat")]],
                            features=np.ones((1, 16, 32)))  # fmt: skip
    assert lessons[0].ids.shape == (2, -(-widest.valid.sum() // 8) * 8)


def test_questions_are_chosen_anew_each_epoch(processor):
    lessons = packed(processor, questions=1, steps=40)
    answers = {
        said(lessons[s], which(lessons[s]).index(0)) for s in range(40) if 0 in which(lessons[s])
    }
    assert answers == {"a cat", "yes", "no"}
    batch = lessons[0]
    assert batch.segment.max() == 1


def test_without_a_seed_they_stand_as_they_are(processor):
    lessons = packed(processor, seed=None)
    assert [which(lessons[step]) for step in range(3)] == [[0, 1], [2, 3], [4, 0]]
    assert said(lessons[0], 0) == "a cat yes"


def test_some_styles_alone(processor):
    some = EXAMPLES[:3]
    lessons = dataclasses.replace(packed(processor, seed=None), examples=some, styles=("yesno",))
    assert said(lessons[0], 0) == "yes no" and said(lessons[0], 1) == "yes"


def test_a_step_outside(processor):
    with pytest.raises(IndexError, match="step 10 of 10"):
        packed(processor)[10]


def test_ask_takes_styles_in_turn():
    pairs = batching.ask(EXAMPLES, ("kind", "yesno"))
    assert [example.id for example, _ in pairs] == list("01234")
    assert [q.style for _, q in pairs] == ["kind", "yesno", "kind", "kind", "yesno"]
    with pytest.raises(ValueError, match="things/3 has no question of style yesno"):
        batching.ask(EXAMPLES, ("yesno",))


def test_asked(processor):
    pairs = batching.ask(EXAMPLES, ("kind", "yesno"))
    length = batching.row_length(processor, pairs)
    batches = batching.QuestionBatches(processor, pairs, size=2, length=length)
    assert len(batches) == 3
    assert {batches[i].ids.shape for i in range(3)} == {(2, length)}
    longest = max(processor(None, [q.prompt]).valid.sum() + 5 for _, q in pairs)  # a picture, "\n"
    assert longest <= length < longest + 8
    last = batches[2]
    assert last.valid.any(1).tolist() == [True, False] and last.is_real_tile.tolist() == [
        True,
        False,
    ]
    want = np.asarray(EXAMPLES[4].image, np.float32) / 255
    np.testing.assert_allclose(last.pixels[0], want, rtol=0, atol=1e-6)
    assert batches.candidates(0) == [("a dog", "a cat"), ("yes", "no")]
    assert batches.right(0).tolist() == [1, 0] and batches.right(2).tolist() == [1]
    with pytest.raises(IndexError, match="batch 3 of 3"):
        batches[3]
    filled = batching.QuestionBatches(processor, pairs, size=2, length=length, filled=4)
    assert len(filled) == 3 and len(filled.rows(0)) == 2
    assert filled[0].valid.any(1).tolist() == [True, True, False, False]
    np.testing.assert_array_equal(filled[1].ids[:2], batches[1].ids)


def test_pairs_are_those_of_ask_and_are_made_when_asked_for():
    class Examples(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    examples = Examples(EXAMPLES)
    pairs = batching.ExampleQuestions(examples, ("kind", "yesno"), 3)
    assert examples.read == 0 and len(pairs) == 3
    assert pairs[1] == batching.ask(EXAMPLES, ("kind", "yesno"))[1] and examples.read == 1
    assert pairs[0:2] + [pairs[2]] == batching.ask(EXAMPLES, ("kind", "yesno"))[:3]
    assert len(batching.ExampleQuestions(EXAMPLES, ("kind",), 99)) == 5
    with pytest.raises(IndexError):
        pairs[3]


def test_stored_features_of_llava_next_are_cut_by_the_size_of_the_picture():
    config = llava_next.LlavaNextConfig.tiny()
    processor = tiny.processor(config)
    wide = [dataclasses.replace(e, image=tiny.picture(i, 24, 60)) for i, e in enumerate(EXAMPLES)]
    features = np.zeros((5, config.tiles * config.vision.feature_tokens, 32), np.float32)
    batch = batching.PackedQuestions(processor, wide, features, 2, 1, 1, None)[0]
    turns = [[("what is shown ?", "a cat")]] * 2
    read = processor.pack([e.image for e in wide[:2]], turns, length=batch.ids.shape[1])
    np.testing.assert_array_equal(batch.image_token_index, read.image_token_index)
    np.testing.assert_array_equal(batch.tokens.kind, read.tokens.kind)


def test_where_a_picture_attends_to_its_question_each_has_a_row(tmp_path):
    processor = study_checkpoints.processor("paligemma", tmp_path / "processor")
    features = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((1, 16, 32), np.float32)
    batches = batching.PackedQuestions(processor, EXAMPLES, features, 2, 2, 2, None)
    batch = batches[1]  # of examples 2 and 3, which have two questions and one
    assert batch.segment is None and which(batch) == [2, 2, 3, 0]
    assert [said(batch, row)[:5] for row in range(3)] == ["a cat", "no", "a cat"]
    assert batch.valid.any(-1).tolist() == [True, True, True, False]
    assert batch.ids.shape == batches[0].ids.shape
    wrong = dataclasses.replace(batches, shift=1)[1]
    assert which(wrong) == [3, 3, 2, 0]
    np.testing.assert_array_equal(wrong.ids, batch.ids)


@pytest.mark.parametrize("line", [0, 1])
def test_the_length_where_a_question_begins_in_a_token_of_the_template(line, tiny_config):
    """A line end that begins a question is one token with that of the template."""
    processor = tiny.processor(tiny_config, lines=("\n", "\n\n"))
    prompts = ["\n" * (n == line) + "what what what ?" for n in range(2)]
    asked = [Question("kind", prompt, "a cat") for prompt in prompts]
    batch = processor.pack([tiny.picture(0)], [[(q.prompt, q.answer) for q in asked]])
    used = batch.valid.sum()
    assert used % 8 == 1, "one more token than rows of a multiple of 8 have"
    assert batching.packed_length(processor, [asked], 2) == used + 7


def test_wrong_pictures_are_read_as_they_lie(tmp_path):
    """The tokens of a picture that is given to another row follow from its own size."""
    processor = study_checkpoints.processor("qwen2.5-vl", tmp_path / "processor")
    images = tiny.picture(0, 24, 40), tiny.picture(1, 16, 16)
    examples = [Example(str(i), image, (WHAT,)) for i, image in enumerate(images)]
    features = np.zeros((2, 512, 32), np.float32)
    batches = batching.PackedQuestions(processor, examples, features, 2, 1, 1, None)
    shapes = [dataclasses.replace(batches, shift=n)[0].grid.tolist() for n in range(2)]
    assert shapes == [[[6, 10], [4, 4]], [[4, 4], [6, 10]]]
