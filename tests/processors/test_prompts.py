"""Chats, templates, tokenizers and what ends an answer: as transformers has them, or one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import transformers

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import tokens as tok
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.passes import score
from mllm_jax.processors import tokenizers
from mllm_jax.processors.processor import Processor
from tests.helpers import tiny

PARTS = (  # as a processor of transformers has it
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] | trim }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": [{"type": "text", "text": "which ?"}]},
]
PLAIN = [
    {"role": "user", "content": "what is it ?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "which ?"},
]


@pytest.fixture(scope="module")
def processor(tiny_config):
    return tiny.processor(tiny_config)


def words(processor, batch, row=0, kind=None) -> list[str]:
    here = batch.valid[row] if kind is None else batch.tokens.kind[row] == tok.CODE[kind]
    return processor.tokenizer.convert_ids_to_tokens(batch.ids[row][here])


def refused(call, match: str) -> None:
    """In one short line."""
    with pytest.raises(ValueError, match=match) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400, said


@pytest.mark.parametrize("chat", [CHAT, PLAIN], ids=["parts", "plain"])
def test_a_chat_of_several_turns(chat, processor):
    """In a template that takes strings: what the user says is question, all else is system."""
    batch = processor([tiny.picture(0)], [chat])
    assert words(processor, batch) == [
        "<|start|>", "user", "\n", *["<image>"] * 4, "\n", "what", "is", "it", "?", "<|end|>", "\n",
        "<|start|>", "assistant", "\n", "a", "cat", "<|end|>", "\n",
        "<|start|>", "user", "\n", "which", "?", "<|end|>", "\n", "<|start|>", "assistant", "\n",
    ]  # fmt: skip
    assert words(processor, batch, kind="question") == ["what", "is", "it", "?", "which", "?"]
    assert batch.last[0] == batch.valid.sum() - 1 and batch.labels is None
    told = processor([tiny.picture(0)], [chat], answers=["red"])
    assert words(processor, told, kind="answer") == ["red", "<eos>"]
    text_alone = processor(None, [PLAIN[2:], "which ?"])
    np.testing.assert_array_equal(text_alone.ids[0], text_alone.ids[1])
    alone = processor([tiny.picture(0)], chat)  # one chat, as transformers takes it
    np.testing.assert_array_equal(alone.ids, batch.ids)


@pytest.mark.parametrize("chat", [CHAT, PLAIN], ids=["parts", "plain"])
def test_a_chat_in_a_template_of_parts(chat, tiny_config):
    processor = tiny.processor(tiny_config, PARTS, bos_token="<s>")
    batch = processor([tiny.picture(0)], [chat])
    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    want = tokenizer(text.replace("<image>", "<image>" * 4))["input_ids"]
    assert batch.ids[0, batch.valid[0]].tolist() == want
    assert words(processor, batch, kind="question") == ["what", "is", "it", "?", "which", "?"]


def test_pictures_in_the_parts_of_a_chat(processor, tmp_path):
    a, b = tiny.picture(0), tiny.picture(1)
    b.save(tmp_path / "b.png")
    parts = [{"type": "image", "image": a}, {"type": "text", "text": "what ?"},
             {"type": "image", "path": str(tmp_path / "b.png")}]  # fmt: skip
    chats = [[{"role": "user", "content": parts}], PLAIN]
    held = processor(None, chats)
    assert held.is_real_tile.tolist() == [True, True, False, False]
    plain = [
        {"role": "user", "content": [{k: p[k] for k in ("type", "text") if k in p} for p in parts]}
    ]
    want = processor([[a, b], []], [plain, PLAIN])
    np.testing.assert_array_equal(held.ids, want.ids)
    np.testing.assert_array_equal(held.pixels, want.pixels)
    refused(lambda: processor([a, b], chats), "give those or images, not both")


def test_an_instructblip_reads_a_chat(random_model):
    processor = tiny.instructblip_processor(InstructBlipConfig.tiny(), tiny.TEMPLATE)
    batch = processor([tiny.picture(0)], [CHAT])
    assert words(processor, batch)[:8] == ["<image>"] * 5 + ["<|start|>", "user", "\n"]
    assert words(processor, batch, kind="question") == ["what", "is", "it", "?", "which", "?"]
    refused(lambda: processor([[tiny.picture(0)] * 2], [CHAT]), "the chat has 1 pictures, not 2")


def test_white_space_of_a_prompt_is_the_users(tiny_config):
    """transformers keeps it: in InstructBLIP, without a template, and in one that does not trim."""
    for make, config in (
        (tiny.instructblip_processor, InstructBlipConfig.tiny()),
        (tiny.processor, tiny_config),
    ):
        processor = make(config, None)
        ids = processor(None, ["what is it ?\n"])
        assert (
            ids.ids[0, ids.valid[0]].tolist() == processor.tokenizer("what is it ?\n")["input_ids"]
        )
    processor = tiny.processor(tiny_config)
    assert words(processor, processor(None, ["\nyes"]))[:5] == [
        "<|start|>",
        "user",
        "\n",
        "\n",
        "yes",
    ]
    trims = tiny.processor(tiny_config, PARTS)
    batch = trims(None, ["\nyes\n"])
    assert words(trims, batch, kind="question") == ["yes"] and "\n" not in words(trims, batch)


BAD_CHATS = {
    "assistant last": (PLAIN[:2], "the chat ends with a turn of the assistant: give that as answers="),
    "no user": ([{"role": "system", "content": "what"}], "no message of the chat has the role user"),
    "no role": ([{"content": "what ?"}], 'a message has "role", a string, and "content"'),
    "no content": ([{"role": "user"}], "message 0: a message has"),
    "video": ([{"role": "user", "content": [{"type": "video"}]}], 'a part is {"type": "image"} or'),
    "a string in parts": ([{"role": "user", "content": ["what"]}], "a part is"),
    "two pictures": ([{"role": "user", "content": [{"type": "image"}] * 2}], "has 2 <image> for 1 pict"),
    "named too": ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>"}]}],
                  "has 2 <image> for 1 pictures"),
    "empty": ([], "neither a string nor a list of messages"),
    "none": (None, "None is neither a string nor a list of messages"),
    "number": (7, "7 is neither a string nor"),
    "bytes": (b"what", "neither a string nor"),
    "mixed": ([PLAIN[0], "what"], "neither a string nor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHATS)
def test_chats_that_are_wrong(name, processor):
    chat, message = BAD_CHATS[name]
    refused(
        lambda: processor([[], tiny.picture(0)], ["what ?", chat]), f"prompts, row 1.*{message}"
    )


def test_a_chat_needs_a_template(tiny_config):
    refused(lambda: tiny.processor(tiny_config, None)(None, [PLAIN]), "row 0: .* no chat template")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes"),
        ("{{ messages[0]['content'] * 10**9 }}", "would be too large"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "once and in order"),
        ("user {{ messages[0]['content']|replace('what', 'which') }} assistant", "once and in order"),
        ("user {{ messages[0]['content'][:2000] }}", "write <image> into the prompt"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used(template, message, tiny_config):
    processor = tiny.processor(tiny_config, template)
    refused(lambda: processor(None, ["what ? " * 1000]), message)


class TestArguments:
    """What is no list, or no list of what it should be."""

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ("a.png", "images is a list with a picture, or a list of pictures.*got str"),
            (b"bytes", "images is a list"),
            (tiny.picture(0), "got Image: write images=.picture."),
            (np.zeros((24, 24, 3), np.uint8), "got ndarray"),
            (7, "got int"),
            ([None], "NoneType"),
            ([7], "int"),
            ([], "0 rows of pictures for 1 prompts"),
            ([[]] * 2, "2 rows of pictures for 1 prompts"),
        ],
    )
    def test_images(self, images, message, processor):
        refused(lambda: processor(images, ["what ?"]), message)

    def test_arrays_of_pictures(self, processor):
        pictures = np.stack([np.asarray(tiny.picture(i)) for i in range(2)])
        a = processor(pictures, np.array(["what ?", "which ?"]))
        b = processor([tiny.picture(0), tiny.picture(1)], ("what ?", "which ?"))
        np.testing.assert_array_equal(a.pixels, b.pixels)
        np.testing.assert_array_equal(a.ids, b.ids)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("what ?", "prompts must be a list of strings or chats, one per row; got 'what .'"),
            (None, "prompts must be a list"),
            ({"role": "user", "content": "what ?"}, "prompts must be a list"),
            ([], "prompts is empty"),
            (["what ?", 3], "prompts, row 1: 3 is neither a string nor"),
        ],
    )
    def test_prompts(self, given, message, processor):
        refused(lambda: processor(None, given), message)
        refused(lambda: processor([], []), "prompts is empty")
        assert processor([], [], rows=2).ids.shape == (2, 32)

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            ("yes", "answers must be a list of strings, one per row; got 'yes'"),
            (["yes", "no"], "2 answers for 1 prompts"),
            ([None], "answers, row 0: None is not a string"),
            ([["yes"]], "answers, row 0: .*is not a string"),
        ],
    )
    def test_answers(self, answers, message, processor):
        refused(lambda: processor(None, ["what ?"], answers=answers), message)

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            ([[("", "a")]], "turns, row 0, question 1: .* non-empty"),
            ([[("which ?", "a"), (" \n", "a")]], "turns, row 0, question 2"),
            ([[]], "turns, row 0: there is no question"),
            ([[("what ?",)]], "not a pair of a non-empty"),
            ([["what ?"]], "turns, row 0 must be a list of pairs"),
            ([[("what ?", None)]], "not a pair of a non-empty"),
            ("what ?", "turns must be a list of"),
            ([[("which ?", "a <image>")]], "turns, row 0, question 1: the answer"),
        ],
    )
    def test_turns(self, turns, message, processor):
        refused(lambda: processor.pack([tiny.picture(0)], turns), message)

    def test_a_long_prompt_is_told_in_short(self, processor):
        refused(
            lambda: processor(None, ["<image> " + "yes " * 5000]), "has 1 <image> for 0 pictures"
        )

    def test_an_empty_prompt(self, tiny_config):
        bare = tiny.processor(tiny_config, None, begin=False)
        for nothing in ("", " "):
            refused(lambda nothing=nothing: bare(None, [nothing]), "row 0: the prompt is empty")


class TestCandidates:
    @pytest.mark.parametrize(
        ("candidates", "message"),
        [
            ("yes", "candidates must be a list of strings, or of lists of strings, .*got 'yes'"),
            (np.array("yes"), "no candidates|candidates must be a list"),
            ({"yes", "no"}, "candidates must be a list"),
            (None, "candidates must be a list"),
            ([], "no candidates to score"),
            ([[], []], "no candidates to score"),
            ([""], "candidates, row 0, number 0: '' is not an answer"),
            (["yes", None], "candidates, row 0"),
            ([["yes"], ["no", 3]], "candidates, row 1, number 1: 3 is not an answer"),
            ([["yes"], "no"], "candidates, row 1: must be a list"),
            ([["yes"]] * 3, "candidates for 3 rows, but the batch has 2"),
            (
                ["yes", "a <image>"],
                "candidates, row 0, number 1: the answer 'a <image>' contains the special token <image>",
            ),
            (np.zeros((2, 3), np.int32), r"int32\[2, C, A\], not \(2, 3\)"),
            (np.zeros((1, 3, 4), np.int32), r"must be int32\[2, C, A\], not"),
            (np.zeros((2, 3, 4)), "is not an answer|is a list"),
        ],
    )
    def test_that_are_none(self, candidates, message, processor, tiny_model):
        batch = processor(None, ["what ?", "which ?"])
        refused(lambda: mj.score(tiny_model, batch, candidates), message)

    def test_any_list_of_strings(self, processor):
        want = score.candidate_ids(processor, ["yes", "a cat"], 2)
        for same in (
            ("yes", "a cat"),
            np.array(["yes", "a cat"]),
            np.array(["yes", "a cat"], object),
            [["yes", "a cat"]] * 2,
            np.array([["yes", "a cat"]] * 2),
            iter(["yes", "a cat"]),
        ):
            np.testing.assert_array_equal(score.candidate_ids(processor, same, 2), want)


@pytest.mark.parametrize("special", ["<image>", "<eos>", "<s>", "<|end|>", "<unk>"])
def test_an_answer_is_plain_text(special, processor):
    """The text of a special token is no word, and would become that token."""
    for answer in (special, f"a {special} cat"):
        refused(
            lambda a=answer: processor.answer_ids(a),
            f"contains the special token {special.replace('|', '.')}:",
        )
        refused(
            lambda a=answer: processor(None, ["a", "b"], answers=["no", a]), "answers, row 1: the"
        )
    kept = processor(None, [f"what {special} ?"]) if special != "<image>" else None
    if kept is not None:  # as transformers has it, so that a prompt can be written out
        assert special in words(processor, kept, kind="question")


def test_special_tokens_that_are_words(tiny_config):
    """A token that a tokenizer also makes of plain text is text."""
    processor = tiny.processor(tiny_config, pad_token="yes")
    assert processor.answer_ids("yes", end=False) == [processor.tokenizer.get_vocab()["yes"]]


class TestEnds:
    def test_where_transformers_stops(self, tiny_config, tmp_path):
        tiny.tokenizer(tiny_config).save_pretrained(tmp_path)

        def stops():
            return Processor.from_directory(tmp_path, tiny_config).stop_ids.tolist()

        assert stops() == [2]
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [2, 9]}}))
        assert stops() == [2, 9]
        fields = {"eos_token_id": [2, 8], "text_config": {"eos_token_id": 2}}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert transformers.GenerationConfig.from_model_config(fields).eos_token_id == [2, 8]
        assert stops() == [2, 8]
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 5]}))
        assert stops() == [2, 7, 5]
        assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [7, 2, 5]
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
        assert stops() == [2, 7]
        (tmp_path / "generation_config.json").write_text("{}")
        assert stops() == [2]
        for wrong in (
            '{"eos_token_id": "7"}',
            '{"eos_token_id": [true]}',
            "[]",
            "{",
            '{"eos_token_id": -3}',
        ):
            (tmp_path / "generation_config.json").write_text(wrong)
            refused(stops, "generation_config.json: ")

    def test_a_row_ends_at_any_of_them(self, tiny_config, tiny_model):
        free = tiny.processor(tiny_config)
        said = np.asarray(
            mj.generate(tiny_model, free(None, ["what ?"]), max_new_tokens=6).tokens[0]
        )
        stop = int(said[3])
        first = said.tolist().index(stop)
        made = Processor(free.tokenizer, None, tiny_config, stop_ids=[stop])
        out = mj.generate(tiny_model, made(None, ["what ?"]), max_new_tokens=6, stop=True)
        tokens = np.asarray(out.tokens[0])
        np.testing.assert_array_equal(tokens[: first + 1], said[: first + 1])
        assert (tokens[first + 1 :] == made.stop_ids[0]).all()
        assert out.text == made.text(said[None, :first])

    def test_a_tokenizer_without_an_end(self, tiny_config, tiny_model):
        tokenizer = tiny.tokenizer(tiny_config)
        tokenizer.eos_token = None
        made = Processor(tokenizer, None, tiny_config)
        batch = made(None, ["what ?"], rows=2)
        assert mj.generate(tiny_model, batch, max_new_tokens=2).text[1] == ""
        refused(lambda: mj.generate(tiny_model, batch, stop=True), "has no token to stop at")
        refused(lambda: mj.score(tiny_model, batch, ["yes"]), "row 0, number 0: .*set eos_token in")
        assert made.answer_ids("yes", end=False)
        listed = Processor(tokenizer, None, tiny_config, stop_ids=[9])
        assert listed.answer_ids("yes")[-1] == 9


def broken_tokenizers():
    core = json.loads(tiny.tokenizer(LlavaNextConfig.tiny()).backend_tokenizer.to_str())
    other = core | {"added_tokens": [{"id": 999, "content": "x", "special": True}]}
    return {
        "empty": b"", "no object": b"[1]", "null": b"null", "nothing in it": b"{}", "no JSON": b"{",
        "added token without fields": json.dumps(other).encode(),
        "another model": json.dumps(core | {"model": {"type": "BPE"}}).encode(),
        "no vocabulary": json.dumps(core | {"model": {"type": "WordLevel", "unk_token": "a"}}).encode(),
        "no UTF-8": b"\xff\xfe{}",
    }  # fmt: skip


class TestFiles:
    @pytest.mark.parametrize("name", broken_tokenizers())
    def test_broken_tokenizers(self, name, tiny_config, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(broken_tokenizers()[name])
        refused(lambda: Processor.from_directory(tmp_path, tiny_config), r"tokenizer.json: ")

    @pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\xff\xff\xff\xff\x0f"])
    def test_broken_sentencepiece(self, content, tiny_config, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(content)
        refused(lambda: Processor.from_directory(tmp_path, tiny_config), r"tokenizer.model: ")

    def test_a_panic_is_an_error(self, tiny_config):
        class PanicException(BaseException):
            pass

        def panic(*args, **kwargs):
            raise PanicException("called `Option::unwrap()`\non a None value")

        panic.name_or_path = "somewhere"
        refused(
            lambda: tokenizers.encode(panic, "what ?"),
            "tokenizer of somewhere cannot read 'what .'",
        )

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tokenizers.encode(interrupted, "what ?")

    def test_a_tokenizer_that_loses_the_question(self, processor, monkeypatch):
        def lose(text, **how):
            return {"input_ids": [1], "offset_mapping": [(0, 0)]}

        lose.name_or_path, lose.eos_token_id = "somewhere", 2
        lose.get_vocab = lambda: {"<image>": processor.config.image_token}
        made = Processor(lose, None, processor.config)
        lose.chat_template = None
        refused(
            lambda: made(None, ["what ?"]), "of somewhere returns no token for 'what .': its files"
        )

    def test_a_tokenizer_of_another_model(self, processor):
        lm = dataclasses.replace(processor.config.lm, vocab=20)
        made = Processor(processor.tokenizer, None, dataclasses.replace(processor.config, lm=lm))
        refused(lambda: made(None, ["what"]), "row 0: .*'user' the id 28, the model has 20 words")
        refused(lambda: made.answer_ids("kind"), "use the tokenizer of this model")

    @pytest.mark.parametrize("name", ["llava", "llava-next", "instructblip"])
    def test_another_image_token(self, name, tiny_config, tmp_path):
        make, config = {
            "llava": (tiny.processor, tiny_config),
            "llava-next": (tiny.processor, LlavaNextConfig.tiny()),
            "instructblip": (tiny.instructblip_processor, InstructBlipConfig.tiny()),
        }[name]
        made = make(config)
        made.tokenizer.save_pretrained(tmp_path)
        if name == "instructblip":
            made.qformer_tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
        kind = type(made)
        assert kind.from_directory(tmp_path, config).config == config
        other = dataclasses.replace(config, image_token=94)
        refused(
            lambda: kind.from_directory(tmp_path, other),
            r"config.json: image_token_index is 94, but .*tokenizer.json beside it\) gives <image> the id 95",
        )

    def test_no_image_token(self, tiny_config, tmp_path):
        """The id that the config names must be its own; one beyond the words is added."""
        names = tiny.SPECIAL[:-1]
        tiny.tokenizer(tiny_config, names=(*names, "<other>")).save_pretrained(tmp_path)
        refused(
            lambda: Processor.from_directory(tmp_path, tiny_config),
            "tokenizer.json: the tokenizer has no token <image>, which this model reads with every",
        )
        for token in (-1, tiny_config.lm.vocab):
            config = dataclasses.replace(tiny_config, image_token=token)
            made = Processor.from_directory(tmp_path, config)
            assert made.config.image_token == made.tokenizer.get_vocab()["<image>"]

    @pytest.mark.parametrize(
        "name", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3", "internvl", "idefics3", "smolvlm",
                 "mistral3", "llava_pixtral"]
    )  # fmt: skip
    def test_no_tokens_around_a_picture(self, name):
        """They would be read as letters, which no model was trained with."""
        family = families.FAMILIES[name]
        kind, config = family.processor, family.config.tiny()

        def make(markers):
            names = ("<unk>", "<s>", "<eos>", *markers, kind.image_text)
            return kind(tiny.tokenizer(config, None, names=names), None, config)

        assert kind.markers and make(kind.markers)
        for missing in kind.markers:
            there = [marker for marker in kind.markers if marker != missing]
            refused(functools.partial(make, there), f"has no token {re.escape(missing)}, which")

    def test_templates_in_files(self, tiny_config, tmp_path):
        tiny.tokenizer(tiny_config, None).save_pretrained(tmp_path)
        for content in ("{", "[]", '{"chat_template": 7}'):
            (tmp_path / "chat_template.json").write_text(content)
            refused(lambda: Processor.from_directory(tmp_path, tiny_config), "chat_template.json: ")
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
        refused(lambda: Processor.from_directory(tmp_path, tiny_config), "can't decode byte 0xff")


SETTINGS = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24},
    "crop_size": {"height": 24, "width": 24},
}  # fmt: skip


class TestImageProcessors:
    @pytest.fixture
    def load(self, tiny_config, tmp_path):
        tiny.tokenizer(tiny_config).save_pretrained(tmp_path)

        def load(**settings):
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS | settings))
            return Processor.from_directory(tmp_path, tiny_config)

        return load

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"crop_size": {"height": 48, "width": 48}},
                "made 48 x 48, the vision tower reads 24 x 24",
            ),
            ({"crop_size": 336}, "336 x 336"),
            ({"size": {"shortest_edge": 40000}}, "size 40000 is more than 16 times the 24"),
            ({"size": {"height": 40000, "width": 40000}}, "size 40000"),
            ({"do_center_crop": False, "size": {"height": 12, "width": 12}}, "made 12 x 12"),
            ({"do_center_crop": False}, r"makes pictures of \(24, 36\), the vision tower reads"),
            ({"do_resize": False, "do_center_crop": False}, r"makes pictures of \(40, 60\)"),
            ({"image_processor_type": "NoSuchProcessor"}, "preprocessor_config.json: no image"),
            ({"size": "large"}, "preprocessor_config.json"),
            ({"size": {"shortest_edge": "24"}}, "preprocessor_config.json"),
            ({"image_std": [0.0, 1.0, 1.0]}, "preprocessor_config.json: pixels are not finite"),
            ({"image_mean": [1.0]}, "preprocessor_config.json: pictures cannot be prepared"),
            ({"resample": 99}, "preprocessor_config.json"),
        ],
    )
    def test_sizes_unlike_the_tower(self, settings, message, load):
        refused(lambda: load(**settings)([tiny.picture(0, 40, 60)], ["what ?"]), message)

    def test_code_of_a_checkpoint_is_never_run(self, load, tmp_path, monkeypatch):
        """Nor does anybody ask whether to."""
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        (tmp_path / "evil.py").write_text(
            "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
            "class Evil:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
        )
        code = {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
        kept = load(**code)([tiny.picture(0)], ["what ?"])
        np.testing.assert_array_equal(kept.pixels, load()([tiny.picture(0)], ["what ?"]).pixels)
        for name in ("Evil", None):
            with pytest.raises(ValueError, match="preprocessor_config.json") as caught:
                load(**code, image_processor_type=name)([tiny.picture(0)], ["what ?"])
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists()

    def test_whatever_is_shown_has_its_tokens(self, processor, monkeypatch):
        """However a family lays out its pictures: a picture without tokens is an error."""
        monkeypatch.setattr(Processor, "_picture_runs", lambda self, number, picture: [[]])
        refused(lambda: processor([tiny.picture(0)], ["what ?"]), "1 pictures need 4 image tokens")
        blind = tiny.instructblip_processor(InstructBlipConfig.tiny())
        refused(lambda: blind([tiny.picture(0)], ["what ?"]), "1 pictures need 5 image tokens")
        refused(
            lambda: processor.pack([tiny.picture(0)], [[("what ?", "a")]]), "need 4 image tokens"
        )
