"""Tables of a user: delimiters, encodings, rows that do not fit, LLaVA's conversations."""

from __future__ import annotations

import json
import logging
import os
import random
import time

import PIL.Image
import pytest

from mllm_jax.data import domains
from mllm_jax.data.domains import table
from mllm_jax.data.embedded import questions

HEADER = ("image", "question", "answer")
ROWS = (("a.png", "Which, then?", "owl"), ("b.png", "Wie heißt er?", "Bläßhuhn"))


@pytest.fixture(autouse=True)
def _images(tmp_path):
    for name in "ab":
        PIL.Image.new("RGB", (5, 5), "blue").save(tmp_path / f"{name}.png")


def csv_text(delimiter=",", end="\n", header=HEADER, rows=ROWS) -> str:
    quoted = [header, *([f'"{cell}"' for cell in row] for row in rows)]
    return end.join(delimiter.join(row) for row in quoted) + end


def read(path) -> list[tuple[str, str, str]]:
    return [(e.id, e.questions[0].prompt, e.questions[0].answer) for e in whole(path)]


def whole(path):
    """The domain, by the reader that `load_user_domains` takes for its ending."""
    name, rows = domains.user.read_rows(path)
    return domains.Domain(name, "test", domains.FileExamples(name, rows))


def refused(path, says: str, kind=ValueError) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=says) as caught:
        whole(path)
    text = str(caught.value)
    assert path.name[-40:] in text
    assert len(text) < 400
    assert "\n" not in text
    assert time.monotonic() - started < 5


class TestCsv:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", ", "])
    @pytest.mark.parametrize("ending", [".csv", ".CSV", ".tsv", ".TSV"])
    def test_delimiters_marks_and_endings(self, tmp_path, encoding, delimiter, ending):
        path = tmp_path / f"birds{ending}"
        for end in ("\n", "\r\n", "\r"):
            path.write_bytes(csv_text(delimiter, end).encode(encoding))
            assert read(path) == list(ROWS)

    def test_a_quoted_newline_and_blank_lines(self, tmp_path):
        path = tmp_path / "birds.csv"
        path.write_text('\n"image",question,answer\n\n"a.png","Which\nis ""it""?",owl\n\n,,\n')
        assert read(path) == [("a.png", 'Which\nis "it"?', "owl")]
        path.write_text('image,question,answer\na.png,"Which\nis it?",owl\nb.png,a,b,c\n')
        refused(path, "line 4: 4 cells under 3 columns")

    @pytest.mark.parametrize("row", ["a.png,Which, then?,owl", "a.png,Which?", "a.png"])
    def test_a_row_of_another_width_is_refused_with_its_line(self, tmp_path, row):
        path = tmp_path / "birds.csv"
        path.write_text(f"image,question,answer\nb.png,What?,tit\n{row}\n")
        refused(path, rf"birds\.csv, line 3: {row.count(',') + 1} cells under 3 columns")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "lacks the columns"),
            (b"\n\n", "lacks the columns"),
            (b"image,question,answer\n", "has no rows"),
            (b"image,question\na,b\n", r"lacks the columns \['answer'\]"),
            (b"image,question,answer,answer\na,b,c,d\n", "line 1: two columns are named 'answer'"),
            (b"image;question;reply\n1;2;3\n", r"lacks the columns \['answer'\].*'reply'"),
            (csv_text().encode("latin-1"), r"line 3: not UTF-8 .*save it as"),
            (csv_text(rows=ROWS[:1]).encode("utf-16-le"), "a NUL character"),
            (csv_text().encode("utf-16")[:-1], "not UTF-16"),
            (b"image,question,answer\na.png,\0,b\n", "line 2: a NUL"),
            (b'image,question,answer\na.png,"open,b\n' + b"x,y,z\n" * 50, "line 2: .*left open"),
            (b'image,question,answer\na.png,"a"b,c\n', "line 2: not a row"),
            (b"image,question,answer\na.png,Which?,\n", r"line 2 lacks the fields \['answer'\]"),
            (b"image,question,answer,id\na,b,c,1\nd,e,f,1\n", "line 3: the id '1' is also that of"),
            (b"a" * 10**6, "line 1: not a row .*field larger"),
            (b"a" * 10**5, "lacks the columns"),
            (b",".join([b"a" * 99] * 10**4), "lacks the columns"),
            (b"image,question,answer\n" + b"a" * 200_000 + b",b,c\n", "field larger than"),
            (b"image,question,answer,options\na,b,c,d|e\n", "line 2: the answer 'c' is not among"),
        ],
    )
    def test_what_is_refused(self, tmp_path, content, says):
        path = tmp_path / "birds.csv"
        path.write_bytes(content)
        refused(path, says)

    def test_files_that_are_none(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.csv")
        (tmp_path / "zero.csv").symlink_to("/dev/zero")
        (tmp_path / "zero.json").symlink_to("/dev/zero")
        for name in ("pipe.csv", "zero.csv", "zero.json"):
            refused(tmp_path / name, "pipe or a device", FileNotFoundError)
        refused(tmp_path / "absent.jsonl", "No such file", FileNotFoundError)
        (tmp_path / "birds.xlsx").write_bytes(b"PK")
        refused(tmp_path / "birds.xlsx", "neither a folder nor a table")

    def test_rows_are_made_when_they_are_needed(self, tmp_path):
        path = tmp_path / "birds.csv"
        lines = ["a.jpg,what?,owl,", "/b.jpg,what?,tit,two", "a.jpg,where?,oak,"]
        path.write_text("\n".join(["image,question,answer,id", *lines]))
        rows = domains.user.read_rows(path)[1]
        assert [(row.id, row.label, row.file) for row in rows] == [
            ("a.jpg", "owl", str(tmp_path / "a.jpg")), ("two", "tit", "/b.jpg")
        ]  # fmt: skip
        assert [len(row.questions()) for row in (rows[0], rows[-1], *rows[1:])] == [2, 1, 1]
        with pytest.raises(IndexError):
            rows[2]

    def test_the_time_is_linear_in_the_rows(self, tmp_path):
        """Each answer once, so that each row may be offered all others."""

        def seconds(count: int) -> float:
            path = tmp_path / f"{count}.csv"
            lines = (f"{i}.jpg,What is {i}?,answer {i}" for i in range(count))
            path.write_text("\n".join(["image,question,answer", *lines]))
            started = time.process_time()
            rows = domains.user.read_rows(path)[1]
            assert len(rows) == count
            assert all(len(row.questions()[0].options) == 4 for row in rows[:: count // 1000])
            return time.process_time() - started

        assert seconds(16000) < 20 * seconds(2000) + 1  # quadratic: 64

    @pytest.mark.slow
    def test_300_000_rows(self, tmp_path):
        path = tmp_path / "many.csv"
        with path.open("w") as file:
            file.write("image,question,answer\n")
            file.writelines(f"{i}.jpg,What is {i}?,answer {i}\n" for i in range(300_000))
        started = time.process_time()
        assert len(whole(path)) == 300_000
        assert time.process_time() - started < 8  # 4 on a busy machine


class TestOptions:
    def test_of_a_large_family_they_are_distinct_and_fixed_by_the_key(self):
        family = tuple(f"answer {i}" for i in range(5000))
        seen = set()
        for number in range(50):
            options = questions.options_for(family[number], family, f"key {number}")
            assert options == questions.options_for(family[number], family, f"key {number}")
            assert len({*options}) == 4
            assert family[number] in options
            seen |= {*options}
        assert len(seen) > 150

    def test_of_many_copies_all_that_there_are(self):
        family = ("yes", "no") * 2000
        assert {*questions.options_for("yes", family, "key")} == {"yes", "no"}


class TestJson:
    def test_lines_errors_are_told_by_number(self, tmp_path):
        good = json.dumps({"image": "a.png", "question": "Which?", "answer": "owl"})
        path = tmp_path / "birds.JSONL"
        path.write_text(good + "\r\n\n" + good.replace("Which", "What") + "\n")
        assert [q.prompt for q in whole(path)[0].questions] == ["Which?", "What?"]
        for bad, says in (
            ("{", "line 2: not JSON"), ("[1]", "line 2: not a JSON object"),
            ("[" * 10**5, "line 2: not JSON"), ("1" * 10**4, "line 2: not JSON"),
            ('{"image": "a.png", "question": "?"}', r"line 2 lacks the fields \['answer'\]"),
            ('{"image": "a.png", "question": "?", "answer": null}', r"\['answer'\]"),
            ('{"image": "a.png", "question": "?", "answer": ["x"]}', "answer is a list, not a te"),
            ('{"image": {"a": 1}, "question": "?", "answer": "x"}', "image is a dict, not a text"),
            ('{"image": "a.png", "question": "?", "answer": " "}', r"\['answer'\]: they are empty"),
            ('{"image": "a.png", "question": "\\ud800", "answer": "x"}', "half a surrogate"),
            ('{"image": "a", "question": "?", "answer": "x", "options": 3}', "options is a int"),
        ):  # fmt: skip
            path.write_text(f"{good}\n{bad}\n")
            refused(path, says)

    def test_options_in_one_text_are_not_its_letters(self, tmp_path):
        path = tmp_path / "birds.jsonl"
        row = {"image": "a.png", "question": "?", "answer": "owl", "options": "owl | tit"}
        path.write_text(json.dumps(row))
        assert whole(path)[0].questions[0].options == ("owl", "tit")


def talk(*said, **fields) -> dict:
    roles = ("human", "gpt") * len(said)
    turns = [{"from": role, "value": value} for role, value in zip(roles, said, strict=False)]
    return {"id": "7", "image": "a.png", "conversations": turns, **fields}


class TestConversations:
    @pytest.mark.parametrize("name", ["llava.json", "llava.JSON", "llava.jsonl"])
    def test_are_questions_about_their_image(self, tmp_path, caplog, name):
        records = [
            talk("<image>\nWhat is shown?", "An owl.", "What colour is it?", "Brown."),
            talk("Is it red?\n<image>", "No.", image="b.png"),
            talk("And this?", "A tit.", id="8"),
            talk("Hello", "Hi", image=None),
            talk("<image><image>Compare.", "Alike.", image=["a.png", "b.png"]),
            talk("Where?", "Here.", image=["b.png"]),
        ]
        path = tmp_path / name
        lines = map(json.dumps, records)
        path.write_text("\n".join(lines) if name.endswith("l") else json.dumps(records, indent=1))
        with caplog.at_level(logging.WARNING):
            domain = whole(path)
        assert [(e.id, [(q.prompt, q.answer) for q in e.questions]) for e in domain] == [
            ("a.png", [("What is shown?", "An owl."), ("And this?", "A tit.")]),
            ("b.png", [("Is it red?", "No."), ("Where?", "Here.")]),
        ]
        assert all(q.style == "category" for e in domain for q in e.questions)
        assert domain[0].image.getpixel((0, 0)) == (0, 0, 255)
        assert caplog.messages == [
            f"{path}: not used: later questions 1, records with no image 1, "
            "records with several images 1"
        ]

    @pytest.mark.parametrize(
        ("conversation", "says"),
        [
            ([], "do not alternate human and gpt"),
            ("text", "conversations is not a list"),
            ([{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}], "do not alternate"),
            ([{"from": "human", "value": "a"}], "do not alternate"),
            ([{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}], "not a list of"),
            ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}], "question"),
        ],
    )
    def test_what_is_none_is_refused_with_its_place(self, tmp_path, conversation, says):
        path = tmp_path / "llava.json"
        path.write_text(json.dumps([talk("a", "b"), talk(conversations=conversation)]))
        refused(path, f"llava.json, record 1.*{says}")

    def test_what_is_no_list_is_refused(self, tmp_path):
        path = tmp_path / "llava.json"
        for content, says in (("{}", "a JSON dict, not a list"), ("", "not JSON"), ("[]", "no rows"),
                              ("[1]", "record 0: not a JSON object"), ("[" * 10**5, "not JSON"),
                              ('{"a": 1}\n{"a": 2}', "not JSON")):  # fmt: skip
            path.write_text(content)
            refused(path, says)

    def test_they_are_trained_on_as_the_questions_of_any_domain(self, tmp_path, tiny_config):
        import numpy as np

        from mllm_jax.data import batching
        from tests.helpers import tiny

        path = tmp_path / "llava.json"
        path.write_text(json.dumps([talk("<image>\nwhat is shown ?", "red")]))
        processor = tiny.processor(tiny_config)
        vision = tiny_config.vision
        features = np.zeros((1, vision.feature_tokens, vision.width), np.float32)
        batch = batching.PackedQuestions(processor, whole(path), features, 1, 1, 1, seed=0)[0]
        labels = batch.ids[0][batch.labels[0][batch.labels[0] >= 0]]
        assert processor.tokenizer.decode(labels[:-1]) == "red"


def corrupted(content: bytes, seed: int) -> bytes:
    """Flipped, cut, repeated, or with foreign bytes, as the seed says."""
    draw = random.Random(seed)
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8, 40])):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.choice([1, 10, len(content) // 2])]
        elif kind == 2:
            content[at:at] = draw.choice([b"\0", b'"', b",", b"\n", b"\r", b"{", b"[" * 5000])
        elif kind == 3:
            content[at:at] = draw.randbytes(draw.choice([1, 4, 64]))
        elif kind == 4:
            content[at : at + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        else:
            content[at:at] = content[: draw.choice([8, 300])]
    return bytes(content)


def tables() -> dict[str, bytes]:
    record = {"image": "a.png", "question": "Which?", "answer": "owl", "options": ["owl", "tit"]}
    return {
        "t.csv": csv_text(rows=ROWS * 5).encode(),
        "s.csv": csv_text(";", "\r\n").encode("utf-16"),
        "t.tsv": csv_text("\t").encode("utf-8-sig"),
        "t.jsonl": "\n".join([json.dumps(record)] * 4).encode(),
        "t.json": json.dumps([talk("<image>\nWhat?", "An owl.")] * 3).encode(),
    }


@pytest.mark.parametrize(
    ("start", "count"), [(0, 60), pytest.param(10**6, 3000, marks=pytest.mark.slow)]
)
def test_corrupted_tables_are_read_or_refused_in_one_line(tmp_path, start, count):
    kinds = tables()
    for seed in range(start, start + count):
        name = sorted(kinds)[seed % len(kinds)]
        path = tmp_path / name
        path.write_bytes(corrupted(kinds[name], seed))
        try:
            domain = whole(path)
            assert all(row.questions() for row in domain._examples._rows)
        except (ValueError, OSError) as error:
            text = str(error)
            assert name in text, (seed, text)
            assert len(text) < 400, (seed, text)
            assert "\n" not in text, (seed, text)
            assert not isinstance(error, UnicodeError), (seed, text)
            continue
        try:
            for example in domain:
                assert example.image.mode == "RGB"
        except ValueError as error:
            text = str(error)
            assert len(text) < 400, (seed, text)
            assert "\n" not in text, (seed, text)
            assert f"domain '{path.stem}'" in text, (seed, text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("owl", r"line 2: options \['owl'\] must be two or more texts, each once"),
        ("owl|owl|tit", "must be two or more texts, each once"),
        ("owl||tit", "must be two or more texts, each once"),
    ],
)
def test_options_are_different_texts(tmp_path, options, says):
    path = tmp_path / "birds.csv"
    path.write_text(f"image,question,answer,options\na.png,Which?,owl,{options}\n")
    refused(path, says)


def test_an_image_has_one_label(tmp_path):
    path = tmp_path / "birds.csv"
    rows = ["a.png,Which?,owl,{}", "a.png,Where?,tree,{}"]
    text = "image,question,answer,label\n" + "\n".join(rows)
    for labels in (("owl", "owl"), ("", "owl"), ("owl", "")):
        path.write_text(text.format(*labels))
        assert [example.label for example in whole(path)] == ["owl"]
    path.write_text(text.format("bird", "owl"))
    refused(path, "line 3: the label of a.png is 'owl', and in line 2 it is 'bird'")


@pytest.mark.parametrize(
    "twin", ["Owl", "owl\N{NO-BREAK SPACE}", "\N{FULLWIDTH LATIN SMALL LETTER O}wl"]
)
def test_answers_that_look_alike_are_named(tmp_path, caplog, twin):
    path = tmp_path / "birds.jsonl"
    objects = [{"image": f"{i}.png", "question": "Which?", "answer": answer}
               for i, answer in zip("ab", ("owl", twin), strict=True)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, objects)))
    assert len(whole(path)) == 2
    assert "differ in case, spaces or Unicode form alone, and count as two" in caplog.text


def test_the_readers_are_those_of_the_endings():
    assert domains.TABLES[".tsv"] is table.from_csv
