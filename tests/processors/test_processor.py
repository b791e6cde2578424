"""Every token of a batch knows what it is; pictures become what the checkpoint saw."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import PIL.Image
import pytest
import sentencepiece
import transformers

import mllm_jax as mj
from mllm_jax import tokens as tok
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.processors.image_processors import pad_to_square
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import LENGTHS
from tests.helpers import tiny


@pytest.fixture(scope="module")
def processor(tiny_config):
    return tiny.processor(tiny_config)


@pytest.fixture(scope="module")
def bare(tiny_config):
    """Without a chat template."""
    return tiny.processor(tiny_config, None)


@pytest.fixture(scope="module")
def cutter():
    """Of a LLaVA-NeXT: pictures of 4 x 4 patches a tile, 5 places for tiles."""
    return tiny.processor(LlavaNextConfig.tiny())


def kinds(batch, row=0) -> str:
    """One letter a token: Pad, System, Question, Image, Newline, Answer."""
    return "".join("PSQINA.."[k] for k in batch.tokens.kind[row])


def words(processor, batch, row=0) -> list[str]:
    ids = batch.ids[row][batch.tokens.kind[row] > 0]
    return processor.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("maker", ["processor", "cutter"])
def test_a_picture_given_again_is_encoded_once(maker, request, random_model):
    made = request.getfixturevalue(maker)
    one, two = tiny.picture(0), tiny.picture(1)
    prompts = ["what is shown ?", "is it red ?", "what ?", "is it ?"]
    shared = made([one, two, one, one], prompts, rows=5)
    apart = made([one, two, one.copy(), one.copy()], prompts, rows=5)
    assert len(shared.pixels) == 2 / 5 * len(apart.pixels)
    np.testing.assert_array_equal(shared.tokens.row, apart.tokens.row)
    model = random_model(made.config)
    a, b = (mj.run(model, batch).logits for batch in (shared, apart))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_into_the_chat_template(processor):
    batch = processor([tiny.picture(0)], ["what is shown ?"])
    assert words(processor, batch) == [
        "<|start|>", "user", "\n", *["<image>"] * 4, "\n", "what", "is", "shown", "?",
        "<|end|>", "\n", "<|start|>", "assistant", "\n",
    ]  # fmt: skip
    assert kinds(batch) == "SSS" + "IIII" + "S" + "QQQQ" + "SSSSS" + "P" * 15
    assert batch.ids.shape == (1, 32) and batch.ids.dtype == np.int32
    np.testing.assert_array_equal(batch.position[0], [*range(17), *[0] * 15])
    np.testing.assert_array_equal(np.flatnonzero(batch.tokens.last[0]), [16])
    assert batch.last.tolist() == [16]
    np.testing.assert_array_equal(batch.image_token_index[0, 3:7], [0, 1, 2, 3])
    assert (np.delete(batch.image_token_index[0], [3, 4, 5, 6]) == -1).all()
    for name, want in {"row": [0, 0, 1, 1], "column": [0, 1, 0, 1], "tile": [0] * 4}.items():
        np.testing.assert_array_equal(getattr(batch.tokens, name)[0, 3:7], want)
    assert batch.segment is None and batch.labels is None and batch.processor is processor
    assert (batch.ids[0, 17:] == processor.tokenizer.eos_token_id).all()


def test_as_it_stands(processor):
    """A prompt with a picture in it is not set into the template; the text begins with <s>."""
    batch = processor([tiny.picture(0)], ["user : <image> what is it ? assistant :"])
    assert words(processor, batch) == [
        "<s>", "user", ":", *["<image>"] * 4, "what", "is", "it", "?", "assistant", ":"
    ]  # fmt: skip
    assert kinds(batch)[:13] == "SQQIIIIQQQQQQ"


def test_without_a_template(bare):
    for images, before in ((None, []), ([tiny.picture(0)], [*["<image>"] * 4, "\n"])):
        batch = bare(images, [" what is it ? "])
        assert words(bare, batch) == ["<s>", *before, "what", "is", "it", "?"]
        assert kinds(batch).rstrip("P").endswith("QQQQ")


def test_a_question_is_found_where_the_user_says_it(processor):
    """Not where the template says the same."""
    batch = processor([tiny.picture(0)], ["assistant"])
    assert words(processor, batch).count("assistant") == 2
    assert kinds(batch)[:14] == "SSSIIIISQSSSSS"
    batch = processor(None, ["assistant"])
    assert kinds(batch)[:9] == "SSSQSSSSS"
    batch = processor([tiny.picture(0)], ["user"])
    assert kinds(batch)[:14] == "SSSIIIISQSSSSS"


def test_several_pictures_and_none(processor):
    pictures = [[tiny.picture(0), tiny.picture(1)], [], tiny.picture(2)]
    batch = processor(pictures, ["what ?", "what ?", "<image> which ?"])
    assert kinds(batch, 0)[:19] == "SSS" + "IIIIS" * 2 + "QQ" + "S" * 4
    assert kinds(batch, 1)[:10] == "SSSQQSSSSS"
    assert kinds(batch, 2)[:8] == "SIIIIQQP"
    assert batch.pixels.shape == (6, 24, 24, 3)
    np.testing.assert_array_equal(batch.is_real_tile, [1, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(batch.tile, [0, 1] * 3)
    np.testing.assert_array_equal(batch.image_token_index[0, [3, 6, 8, 11]], [0, 3, 4, 7])
    np.testing.assert_array_equal(batch.image_token_index[2, 1:5], [16, 17, 18, 19])
    np.testing.assert_array_equal(batch.tokens.tile[0, [3, 8]], [0, 1])
    assert batch.tokens.tile[2, 1] == 0
    for place, seed in ((0, 0), (1, 1), (4, 2)):
        want = np.asarray(tiny.picture(seed), np.float32) / 255
        np.testing.assert_allclose(batch.pixels[place], want, rtol=0, atol=1e-6)
    assert not batch.pixels[[2, 3, 5]].any()


def test_text_alone_has_no_pictures(processor):
    batch = processor(None, ["what is it ?", "yes"])
    assert (
        not len(batch.is_real_tile)
        and not len(batch.pixels)
        and (batch.image_token_index == -1).all()
    )


def test_a_cls_token_of_the_features(tiny_config):
    vision = dataclasses.replace(tiny_config.vision, select="full")
    projector = dataclasses.replace(tiny_config.projector, fold=1)
    config = dataclasses.replace(tiny_config, vision=vision, projector=projector)
    batch = tiny.processor(config)([tiny.picture(0)], ["<image>"])
    assert config.image_tokens == 17 and kinds(batch)[:19] == "S" + "I" * 17 + "P"
    np.testing.assert_array_equal(batch.tokens.row[0, 1:18], [-1, *np.arange(16) // 4])
    np.testing.assert_array_equal(batch.tokens.column[0, 1:18], [-1, *np.arange(16) % 4])


def test_tiles_and_newlines(cutter):
    """A picture of 12 x 24: the whole in tile 0, then its halves side by side."""
    batch = cutter([tiny.picture(0, 12, 24)], ["<image> what"])
    assert kinds(batch).rstrip("P") == "S" + "I" * 16 + ("I" * 8 + "N") * 4 + "Q"
    seen, at = batch.tokens, np.arange(17, 53).reshape(4, 9)
    assert (seen.tile[0, 1:17] == 0).all()
    np.testing.assert_array_equal(seen.row[0, 1:17], np.arange(16) // 4)
    np.testing.assert_array_equal(seen.column[0, 1:17], np.arange(16) % 4)
    for row, line in enumerate(at):
        np.testing.assert_array_equal(seen.tile[0, line], [1] * 4 + [2] * 4 + [-1])
        np.testing.assert_array_equal(seen.row[0, line], [row] * 8 + [-1])
        np.testing.assert_array_equal(seen.column[0, line], [0, 1, 2, 3] * 2 + [-1])
        want = [*range(16 + 4 * row, 20 + 4 * row), *range(32 + 4 * row, 36 + 4 * row), 5 * 16]
        np.testing.assert_array_equal(batch.image_token_index[0, line], want)
    np.testing.assert_array_equal(batch.image_token_index[0, 1:17], np.arange(16))
    assert (batch.ids[0, 1:53] == 95).all()
    assert batch.pixels.shape == (5, 24, 24, 3)
    assert batch.is_real_tile.tolist() == [True] * 3 + [False] * 2 and batch.tile.tolist() == [
        *range(5)
    ]
    assert tok.newline.mask(seen).sum() == 4 and tok.tile(2).mask(seen).sum() == 16


def test_rows_of_pictures_of_many_shapes(cutter):
    pictures = [[tiny.picture(0, 48, 48), tiny.picture(1, 70, 24)], tiny.picture(2, 12, 24), []]
    batch = cutter(pictures, ["<image> <image> what", "<image> what", "what ?"], rows=4)
    assert batch.pixels.shape == (40, 24, 24, 3)
    counts = [[5, 4], [3, 0], [0, 0], [0, 0]]
    real = np.arange(5) < np.array(counts)[:, :, None]
    np.testing.assert_array_equal(batch.is_real_tile, real.ravel())
    np.testing.assert_array_equal(batch.tile, [*range(10)] * 4)
    assert (
        batch.pixels[batch.is_real_tile].any((1, 2, 3)).all()
        and not batch.pixels[~batch.is_real_tile].any()
    )
    tile = batch.tokens.tile
    assert [np.unique(row).tolist() for row in tile[:2]] == [[-1, *range(9)], [-1, 0, 1, 2]]
    image = batch.tokens.kind == tok.CODE["image"]
    place = np.arange(4)[:, None] * 10 + tile  # every patch is of the tile that it says
    np.testing.assert_array_equal(batch.image_token_index[image] // 16, place[image])
    assert (batch.image_token_index[batch.tokens.kind == tok.CODE["newline"]] == 40 * 16).all()
    single = cutter([tiny.picture(2, 12, 24)], ["<image> what"])
    np.testing.assert_array_equal(batch.pixels[10:13], single.pixels[:3])


def test_features_of_pictures_that_are_cut(cutter):
    """In place of pictures they need to know how large those were."""
    shapes, prompts = [(12, 24), (48, 48)], ["what ?", "is it ?"]
    batch = cutter([tiny.picture(0, *shape) for shape in shapes], prompts, rows=3)
    features = np.random.default_rng(0).normal(size=(2, 5 * 16, 32)).astype(np.float32)
    given = cutter(None, prompts, features=features, sizes=shapes, rows=3)
    for name in ("ids", "image_token_index", "is_real_tile", "tile"):
        np.testing.assert_array_equal(getattr(given, name), getattr(batch, name))
    assert given.features.shape == (15, 16, 32)
    np.testing.assert_array_equal(given.features[5:10].reshape(80, 32), features[1])
    turns = [[(prompt, "yes")] for prompt in prompts]
    pack = cutter.pack(None, turns, features=features, sizes=shapes, rows=3)
    for row, length in enumerate(batch.valid.sum(-1)[:2]):
        for name in ("ids", "image_token_index"):
            ours, theirs = (getattr(x, name)[row, :length] for x in (pack, batch))
            np.testing.assert_array_equal(ours, theirs)
        assert kinds(pack, row).rstrip("P") == kinds(batch, row).rstrip("P") + "AA"


def test_rows_longer_than_the_longest_of_lengths(processor):
    assert processor(None, ["yes " * 4100]).ids.shape[1] == 5 * 1024
    assert processor(None, ["yes " * 5200]).ids.shape[1] == 6 * 1024


def test_answers(processor):
    batch = processor(None, ["which ?", "what is it ?"], answers=["a cat", "no"])
    assert words(processor, batch, 0)[-3:] == ["a", "cat", "<eos>"]
    assert kinds(batch, 0)[:14] == "SSSQQSSSSSAAAP"
    assert kinds(batch, 1)[:15] == "SSSQQQQSSSSSAAP"
    np.testing.assert_array_equal(batch.labels, [[10, 11, 12] + [-1] * 5, [12, 13] + [-1] * 6])
    assert batch.last.tolist() == [9, 11]  # the prompt ends there
    assert processor.answer_ids("a cat", end=False) == batch.ids[0, 10:12].tolist()


def test_left(processor):
    right, left = (
        processor(None, ["which ?", "what is it ?"], answers=["a cat", "no"], left=left)
        for left in (False, True)
    )
    assert kinds(left, 0) == "P" * 19 + "SSSQQSSSSSAAA"
    for name in ("ids", "position"):
        for row in range(2):
            a, b = (getattr(x, name)[row][x.tokens.kind[row] > 0] for x in (left, right))
            np.testing.assert_array_equal(a, b)
    assert left.last.tolist() == [28, 29]
    np.testing.assert_array_equal(left.labels[:, :3], [[29, 30, 31], [30, 31, -1]])


def test_rows_and_lengths(processor):
    batch = processor([tiny.picture(0)], ["what ?"], rows=3, length=21)
    assert batch.ids.shape == (3, 21) and batch.is_real_tile.tolist() == [True, False, False]
    assert not batch.valid[1:].any() and not batch.tokens.last[1:].any()
    long = processor(None, ["yes " * 40])
    assert long.ids.shape[1] == 64 == next(n for n in LENGTHS if n >= 48)
    with pytest.raises(ValueError, match="a row has 15 tokens, more than length=8"):
        processor([tiny.picture(0)], ["what ?"], length=8)


def test_features_in_place_of_pictures(processor):
    features = np.random.default_rng(0).normal(size=(2, 16, 32)).astype(np.float32)
    batch = processor(None, ["what ?", "which ?"], features=features, rows=3)
    np.testing.assert_array_equal(batch.features[:2], features)
    assert batch.features.shape == (3, 16, 32) and not batch.features[2].any()
    assert batch.is_real_tile.tolist() == [True, True, False] and batch.pixels.shape == (3, 0, 0, 3)
    assert kinds(batch, 1)[3:7] == "IIII"
    np.testing.assert_array_equal(batch.image_token_index[1, 3:7], [4, 5, 6, 7])


def test_pack(processor):
    turns = [
        [("what is shown ?", "a cat"), ("which ?", "red"), ("is it ?", "no")],
        [("which ?", "blue")],
    ]
    features = np.ones((2, 16, 32), np.float32)
    batch = processor.pack(None, turns, features=features, rows=3, length=48)
    first, second, third = "QQQQSSSSSAAA", "QQSSSSSAA", "QQQSSSSSAA"
    assert kinds(batch, 0).rstrip("P") == "SSSIIIIS" + first + second + third
    assert kinds(batch, 1).rstrip("P") == "SSSIIIIS" + second
    assert not batch.valid[2].any()
    sizes = [8, len(first), len(second), len(third)]
    np.testing.assert_array_equal(batch.segment[0, : sum(sizes)], np.repeat([0, 1, 2, 3], sizes))
    want = np.concatenate([np.arange(8), *(8 + np.arange(n) for n in sizes[1:])])
    np.testing.assert_array_equal(batch.position[0, : sum(sizes)], want)
    answers = [17, 18, 19, 27, 28, 37, 38, -1]
    np.testing.assert_array_equal(batch.labels[0], answers)
    assert batch.last.tolist()[:2] == [16, 14]  # the first question's prompt
    for segment, (question, answer) in enumerate(turns[0], 1):
        alone = processor(None, [question], answers=[answer], features=features[:1])
        here = (batch.segment[0] == segment) | ((batch.segment[0] == 0) & batch.valid[0])
        for name in ("ids", "position"):
            ours, theirs = getattr(batch, name)[0, here], getattr(alone, name)[0]
            np.testing.assert_array_equal(ours, theirs[alone.valid[0]])


def test_text(processor):
    said = np.array([processor.answer_ids("a cat") + processor.answer_ids("no"), [-1] * 5])
    assert processor.text(said) == ["a cat", ""]
    assert processor.text(said, stop=False) == ["a cat no", ""]
    assert processor.stop_ids.tolist() == [said[0, 2]]
    assert processor.word(said[0, 1]) == "cat"


def test_generated_text(processor, tiny_model):
    """With an empty row, which says nothing."""
    batch = processor(None, ["what is shown ?"], rows=2)
    out = mj.generate(tiny_model, batch, max_new_tokens=2)
    assert out.text == processor.text(out.tokens, stop=False) and out.text[1] == ""
    assert (np.asarray(out.tokens[0]) >= 0).all()


@pytest.mark.parametrize("shape", [(24, 24), (60, 40), (17, 90)])
def test_pixels_are_those_of_the_checkpoint(shape, tiny_config, tmp_path):
    """Shortest edge to 24, bicubic; the middle; normalised."""
    tiny.tokenizer(tiny_config).save_pretrained(tmp_path)
    mean, deviation = [0.48, 0.45, 0.40], [0.26, 0.27, 0.28]
    settings = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24},
        "crop_size": {"height": 24, "width": 24}, "image_mean": mean, "image_std": deviation,
        "resample": 3,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = Processor.from_directory(tmp_path, tiny_config)
    noise = np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise)
    picture.save(tmp_path / "noise.png")
    batch = processor([picture, tmp_path / "noise.png"], ["what ?", "<image>"])
    np.testing.assert_array_equal(batch.pixels[0], batch.pixels[1])

    scale = 24 / min(shape)
    small = picture.resize((int(shape[0] * scale), int(shape[1] * scale)), PIL.Image.BICUBIC)
    left, top = (small.width - 24) // 2, (small.height - 24) // 2
    middle = np.asarray(small.crop((left, top, left + 24, top + 24)), np.float32) / 255
    want = (middle - np.array(mean)) / np.array(deviation)
    np.testing.assert_allclose(batch.pixels[0], want, rtol=0, atol=1e-5)
    assert kinds(batch)[:13] == "SSSIIIISQQSSS"  # the template came along
    assert processor.directory == tmp_path


@pytest.mark.parametrize("shape", [(24, 24), (60, 40), (17, 90), (1, 30)])
def test_padded_to_a_square(shape, tiny_config, tmp_path):
    """As the original LLaVA, and as transformers can be told to."""
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    tiny.tokenizer(tiny_config).save_pretrained(tmp_path)
    images.save_pretrained(tmp_path)
    read = Processor.from_directory(tmp_path, tiny_config, image_aspect_ratio="pad")
    picture = tiny.picture(0, *shape)
    want = transformers.LlavaImageProcessorPil(**images.to_dict() | {"do_pad": True})
    want = want(picture, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(read([picture], ["what ?"]).pixels, want)
    cropped = Processor.from_directory(tmp_path, tiny_config)([picture], ["what ?"]).pixels
    assert np.array_equal(cropped, want) == (shape == (24, 24))


def test_bars_have_the_mean_colour():
    square = np.asarray(pad_to_square(tiny.picture(0, 3, 8), [0.5, 0.25, 0.1]))
    np.testing.assert_array_equal(square[2:5], np.asarray(tiny.picture(0, 3, 8)))
    bars = np.concatenate([square[:2], square[5:]])
    np.testing.assert_array_equal(bars, np.broadcast_to([127, 63, 25], (5, 8, 3)))
    tall = np.asarray(pad_to_square(tiny.picture(0, 8, 4), [0, 0, 0]))
    np.testing.assert_array_equal(tall[:, 2:6], np.asarray(tiny.picture(0, 8, 4)))


def test_a_template_in_a_file_of_its_own(tiny_config, tmp_path):
    tiny.tokenizer(tiny_config, None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("user {{ messages[0]['content'] }} assistant")
    processor = Processor.from_directory(tmp_path, tiny_config)
    assert words(processor, processor(None, ["what ?"])) == ["user", "what", "?", "assistant"]


def test_the_template_of_a_processor_counts_before_that_of_its_tokenizer(tiny_config, tmp_path):
    """As in LLaVA-NeXT on Mistral, whose tokenizer has that of a model of text alone."""

    def template(name: str) -> str:
        return f"{name} {{{{ messages[0]['content'] }}}} assistant"

    def said():
        processor = Processor.from_directory(tmp_path, tiny_config)
        their, _ = transformers.ProcessorMixin.get_processor_dict(tmp_path)
        want = their.get("chat_template", processor.tokenizer.chat_template)
        assert processor.chat_template.source == want
        return words(processor, processor(None, ["what ?"]))[0]

    tiny.tokenizer(tiny_config, None).save_pretrained(tmp_path)
    at = tmp_path / "tokenizer_config.json"
    fields = json.loads(at.read_text())
    at.write_text(json.dumps(fields | {"chat_template": template("no")}))
    assert said() == "no"
    (tmp_path / "chat_template.jinja").write_text(template("user"))
    assert said() == "user"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template("first")}))
    assert said() == "first"
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": template("a")}))
    assert said() == "a"


def test_a_tokenizer_of_sentencepiece_alone(tiny_config, tmp_path):
    """As `liuhaotian/llava-v1.5-7b` has it: words are the ids that sentencepiece itself gives."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is shown ? a cat on the mat", "USER: yes ASSISTANT: no"] * 20),
        model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    kind = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    pictures = tiny.processor(tiny_config).image_processor
    lm = dataclasses.replace(tiny_config.lm, vocab=300)
    config = dataclasses.replace(tiny_config, image_token=300, lm=lm)  # the first id of no word
    processor = Processor.from_directory(tmp_path, config, pictures=lambda: pictures)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("what is  shown ?", "USER: zebra \n é ASSISTANT:", "the mat"):
        assert processor.tokenizer(text)["input_ids"] == [1, *theirs.encode(text)]
    assert (
        processor.tokenizer.convert_tokens_to_ids("<image>") == processor.config.image_token == 300
    )
    batch = processor([tiny.picture(0)], ["<image> what is shown ?"])
    assert (batch.tokens.kind == mj.tokens.CODE["image"]).sum() == tiny_config.image_tokens
    assert batch.ids[0, tiny_config.image_tokens + 1 :].max() < 300


def test_a_checkpoint_without_its_files(tiny_config, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has neither tokenizer.json nor tokenizer.model: "
    ):
        Processor.from_directory(tmp_path, tiny_config)
    tiny.tokenizer(tiny_config).save_pretrained(tmp_path)
    processor = Processor.from_directory(tmp_path, tiny_config)
    processor(None, ["text alone needs no image processor"])
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config.json to prepare"):
        processor([tiny.picture(0)], ["what ?"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p(None, "what ?"), ValueError, "prompts must be a list of strings or chats, one per row"),
        (lambda p: p([tiny.picture(0)], ["a", "b"]), ValueError, "1 rows of pictures for 2 prompts"),
        (lambda p: p(None, ["a"], answers=["b", "c"]), ValueError, "2 answers for 1 prompts"),
        (lambda p: p(None, ["<image> a"]), ValueError,
         "the prompt '<image> a' has 1 <image> for 0 pictures"),
        (lambda p: p([[tiny.picture(0)] * 2], ["<image> a"]), ValueError, "1 <image> for 2 pict"),
        (lambda p: p(["nowhere.png"], ["a"]), ValueError, "cannot read the picture nowhere.png: "),
        (lambda p: p([__file__], ["a"]), ValueError, "cannot read the picture .*test_processor.py"),
        (lambda p: p([tiny.picture(0)], ["a"], features=np.ones((1, 16, 32))), ValueError,
         "give images or features, not both"),
        (lambda p: p(None, ["a"], features=np.ones((1, 32, 32))), ValueError,
         r"features has the shape \(1, 32, 32\): it must be \[rows, 16, width\]"),
        (lambda p: p(None, ["a"], features=np.ones((1, 16))), ValueError, "must be .rows, 16, width"),
        (lambda p: p(None, ["a"], features=np.ones((2, 16, 32))), ValueError,
         "features of 2 pictures for 1 rows"),
        *((lambda p, rows=rows: p(None, ["a"], rows=rows), ValueError, "rows=.* is not a whole number")
          for rows in (0, -1, 2.5, "3", True)),
        *((lambda p, n=n: p(None, ["a"], length=n), ValueError, "length=.* is not a whole number")
          for n in (0, -1, 64.0, "64")),
        (lambda p: p(None, ["a", "b"], rows=1), ValueError, "rows=1 for 2 prompts: a batch needs one row"),
        (lambda p: p.pack(None, []), ValueError, "rows=0 for 0 prompts"),
        (lambda p: p.pack(None, [[("<image> a", "b")]], features=np.ones((1, 16, 32))), ValueError,
         "the packed question '<image> a' contains its picture again"),
    ],
)  # fmt: skip
def test_errors(call, error, message, processor):
    with pytest.raises(error, match=message):
        call(processor)


def test_errors_of_pictures_that_are_cut(cutter):
    features = np.ones((1, 80, 32), np.float32)
    with pytest.raises(
        ValueError, match=r"cuts a picture by its size: with features= also give sizes"
    ):
        cutter(None, ["a"], features=features)
    with pytest.raises(ValueError, match="2 rows of pictures for 1 prompts"):
        cutter(None, ["a"], features=features, sizes=[(24, 24)] * 2)
    with pytest.raises(ValueError, match="sizes= is only for features="):
        cutter([tiny.picture(0)], ["a"], sizes=[(24, 24)])
    config = cutter.config
    with pytest.raises(ValueError, match="image_aspect_ratio='pad': this model has anyres"):
        Processor(cutter.tokenizer, None, config, image_aspect_ratio="pad")
    other = dataclasses.replace(config, pinpoints=((24, 48),))
    with pytest.raises(
        ValueError, match=r"cuts pictures at \(\(24, 48\), .*the model at \(\(24, 48"
    ):
        Processor(cutter.tokenizer, lambda: cutter.image_processor, other)([tiny.picture(0)], ["a"])


def test_an_unknown_aspect_ratio(processor):
    with pytest.raises(
        ValueError, match="image_aspect_ratio='crop': this model has square and pad"
    ):
        Processor(processor.tokenizer, None, processor.config, image_aspect_ratio="crop")


def test_a_template_that_wants_something_else(tiny_config):
    strict = tiny.processor(tiny_config, "{{ raise_exception('only tools') }}")
    with pytest.raises(
        ValueError, match=r"does not accept a plain user turn \(only tools\); write <im"
    ):
        strict(None, ["what ?"])
