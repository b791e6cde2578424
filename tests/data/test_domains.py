"""The Domain interface, the cache of the embedded domains, and bad input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import types

import numpy as np
import PIL.Image
import pytest

from mllm_jax.data import domains, packages
from mllm_jax.data.embedded import questions, recipe

USERS_ROOT = domains.default_root()  # before the fixture below moves the cache
LABELS = ("an apple", "a pear", "a plum", "a fig")


def painted(seed: int) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return PIL.Image.fromarray(noise).resize((recipe.SIZE, recipe.SIZE))


def candidates():
    for number in range(40):
        yield recipe.Candidate(
            f"c{number}", LABELS[number % 4], f"g{number}", f"box {number}", "CC0",
            lambda number=number: painted(number),
        )  # fmt: skip


WHEEL = packages.Wheel("numpy", "1", "BSD", "https://numpy.org")
RECIPE = recipe.Recipe(
    "objects", (recipe.Family(LABELS, test=2, train=3),), (WHEEL,), (candidates,), "painted"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny_recipes(monkeypatch):
    """`objects` is made of painted blots; the packages of all other domains are missing."""

    def found(name):
        if name == "objects":
            return RECIPE
        raise packages.MissingPackage(f"domain {name!r} needs the package 'x': pip install x")

    monkeypatch.setattr(domains.builder, "recipe", found)


def example(**changes) -> domains.Example:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), "red").save(stream, "PNG")
    fields = {
        "id": "one", "domain": "fruit", "label": "a fig", "encoded": stream.getvalue(),
        "questions": questions.questions_for("one", "a fig", LABELS), "source": "box 1",
    }  # fmt: skip
    return domains.Example(**{**fields, **changes})


class TestExample:
    def test_image_is_rgb_and_transparency_is_white(self):
        assert example().image.getpixel((0, 0)) == (255, 0, 0)
        for mode in ("RGBA", "LA", "P"):
            stream = io.BytesIO()
            image = PIL.Image.new("RGBA", (4, 3), (9, 9, 9, 0)).convert(mode)
            image.save(stream, "PNG", **({"transparency": 0} if mode == "P" else {}))
            image = example(encoded=stream.getvalue()).image
            assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))

    @pytest.mark.parametrize("keep", [0, 20, 2000], ids=["empty", "header", "truncated"])
    def test_an_unreadable_image_is_named(self, keep):
        broken = example(encoded=recipe.jpeg(painted(0))[:keep])
        with pytest.raises(ValueError, match=r"domain 'fruit', example 'one': the image box 1 can"):
            _ = broken.image

    def test_ask_finds_a_style_or_lists_those_there_are(self):
        assert example().ask("choice").answer == "a fig"
        with pytest.raises(ValueError, match=r"'one' has no question of style 'kind'.*'choice'"):
            example().ask("kind")


class TestDomain:
    def test_is_a_sequence(self):
        domain = domains.Domain("fruit", "test", [example(id=str(n)) for n in range(5)])
        assert len(domain) == 5
        assert domain[-1].id == "4"
        assert [e.id for e in domain] == list("01234")
        assert [e.id for e in domain[1:4:2]] == ["1", "3"]
        assert isinstance(domain[:2], domains.Domain)
        with pytest.raises(IndexError):
            domain[5]

    def test_empty_is_refused(self):
        with pytest.raises(ValueError, match=r"domain 'fruit' \(test\) is empty"):
            domains.Domain("fruit", "test", [])

    def test_fingerprint_follows_the_content_and_the_order(self):
        one, two = example(id="1"), example(id="2")
        prints = {
            domains.Domain("fruit", "test", chosen).fingerprint
            for chosen in ([one, two], [two, one], [one], [one, example(id="2", label="a pear")])
        }
        assert len(prints) == 4

    def test_fewer_than_two_are_refused_where_domains_are_compared(self):
        one = {"fruit": domains.Domain("fruit", "test", [example()])}
        with pytest.raises(ValueError, match=r"needs 2 or more, but there are 1: \['fruit'\]"):
            domains.require_domains(one)
        with pytest.raises(ValueError, match="there are 0: none"):
            domains.require_domains({})
        domains.require_domains({**one, "nuts": one["fruit"]})


class TestEmbedded:
    def test_is_built_once_and_read_back(self, tmp_path, tiny_recipes, monkeypatch):
        found = domains.embedded("test", ["objects"])
        assert list(found) == ["objects"]
        assert (tmp_path / "cache" / "domains" / domains.VERSION / "objects").is_dir()
        assert len(found["objects"]) == 8
        assert {e.label for e in found["objects"][:4]} == {*LABELS}  # any beginning is balanced
        first = found["objects"][0]
        assert [q.style for q in first.questions] == [
            "kind",
            "category",
            "yesno",
            "yesno",
            "choice",
        ]
        assert first.image.size == (recipe.SIZE, recipe.SIZE)
        monkeypatch.setattr(recipe, "find", lambda made: pytest.fail("built twice"))
        train = domains.embedded("train", ["objects"])["objects"]
        assert len(train) == 12
        assert not {e.id for e in train} & {e.id for e in found["objects"]}

    def test_is_the_same_wherever_it_is_built(self, tmp_path, tiny_recipes):
        prints = [
            domains.embedded("train", ["objects"], root=tmp_path / name)["objects"].fingerprint
            for name in "ab"
        ]
        assert prints[0] == prints[1]

    def test_missing_domains_are_named_one_a_line(self, tiny_recipes, capsys):
        assert list(domains.embedded()) == ["objects"]
        lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert len(lines) == 4
        assert "domain 'medical' is left out: domain 'medical' needs the package 'x'" in lines[0]

    def test_a_domain_asked_for_by_name_must_be_there(self, tiny_recipes):
        with pytest.raises(packages.MissingPackage, match="pip install x"):
            domains.embedded("test", ["objects", "medical"])

    def test_an_absent_python_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nibabel", None)
        monkeypatch.delitem(sys.modules, "mllm_jax.data.embedded.medical", raising=False)
        with pytest.raises(packages.MissingPackage, match=r"'medical'.*pip install nibabel"):
            domains.recipe("medical")

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="unknown domain 'medica'"):
            domains.embedded("test", ["medica"])
        with pytest.raises(ValueError, match="unknown split 'val'"):
            domains.embedded("val")

    def test_a_full_disk_leaves_nothing_behind(self, tmp_path, tiny_recipes, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(domains.records, "pack", full)
            with pytest.raises(OSError, match=r"No space left on device.*MLLM_JAX_CACHE"):
                domains.embedded("test", ["objects"], root=tmp_path / "root")
        assert list((tmp_path / "root").iterdir()) == []
        assert len(domains.embedded("test", ["objects"], root=tmp_path / "root")["objects"]) == 8

    def test_a_short_write_is_noticed(self, tmp_path, tiny_recipes, monkeypatch):
        from array_record.python import array_record_module

        class Forgetful:
            """Writes like a disk that fills up silently: the later records are lost."""

            def __init__(self, *arguments):
                self._writer, self._left = real(*arguments), 3

            def write(self, record):
                self._left -= 1
                if self._left >= 0:
                    self._writer.write(record)

            def close(self):
                self._writer.close()

        real = array_record_module.ArrayRecordWriter
        monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Forgetful)
        with pytest.raises(OSError, match="reads back differently"):
            domains.embedded("test", ["objects"], root=tmp_path / "root")
        assert list((tmp_path / "root").iterdir()) == []

    def test_leftovers_of_a_killed_build_are_not_read_and_go_away(self, tmp_path, tiny_recipes):
        root = tmp_path / "root"
        old, new = root / ".objects.partial.old", root / ".objects.partial.new"
        for folder in (old, new):
            folder.mkdir(parents=True)
            (folder / "index.json").write_text("{}")
        os.utime(old, (0, 0))
        assert len(domains.embedded("test", ["objects"], root=root)["objects"]) == 8
        assert not old.exists()
        assert new.exists()  # may belong to a build that runs now

    def test_index_tells_counts_sources_and_licences(self, tmp_path, tiny_recipes):
        index = domains.build("objects", tmp_path)
        assert json.loads((tmp_path / "objects" / "index.json").read_text()) == index
        assert index["splits"]["test"]["labels"] == dict.fromkeys(sorted(LABELS), 2)
        assert index["splits"]["train"]["licences"] == {"CC0": 12}
        assert index["sources"][0]["version"] == np.__version__

    def test_a_damaged_file_is_named(self, tmp_path, tiny_recipes):
        domains.build("objects", tmp_path)
        path = tmp_path / "objects" / "test.array_record"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"test\.array_record cannot be read.*build it again"):
            len(domains.embedded("test", ["objects"], root=tmp_path)["objects"])

    def test_records_are_those_that_were_written(self, tmp_path, tiny_recipes):
        """Not those of the other split, of another domain, nor with a flipped bit."""
        domains.build("objects", tmp_path)
        path, other = (tmp_path / "objects" / f"{s}.array_record" for s in ("test", "train"))
        content = path.read_bytes()
        at = content.index(b'"label"')
        flips = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in (at, at + 200)]
        for changed in (other.read_bytes(), *flips):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"test\.array_record.* delete .* build it again"):
                domains.embedded("test", ["objects"], root=tmp_path)
        path.write_bytes(content)
        assert len(domains.embedded("test", ["objects"], root=tmp_path)["objects"]) == 8
        (tmp_path / "objects").rename(tmp_path / "medical")
        with pytest.raises(ValueError, match="medical holds the domain 'objects'; delete"):
            domains.embedded("test", ["medical"], root=tmp_path)


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        for number, label in enumerate(["owl", "owl", "tit"]):
            path = tmp_path / "birds" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (5, 5), (number, 0, 0)).save(path)
        (tmp_path / "birds" / "owl" / "notes.txt").write_text("no image")
        return tmp_path / "birds"

    def test_folders_are_labels(self, folder):
        domain = domains.Domain.from_folder(folder)
        assert (domain.name, len(domain)) == ("birds", 3)
        assert [e.id for e in domain] == ["owl/0.png", "owl/1.png", "tit/2.png"]
        assert [e.image.getpixel((0, 0))[0] for e in domain] == [0, 1, 2]
        assert {q.style for q in domain[0].questions} == {"category", "yesno", "choice"}
        assert {*domain[0].ask("choice").options} == {"owl", "tit"}

    def test_own_question(self, folder):
        domain = domains.Domain.from_folder(folder, question="Which bird is it?", name="b")
        assert domain[2].ask("category").prompt == "Which bird is it?"
        assert domain[2].ask("category").answer == "tit"

    def test_bad_folders_are_named(self, tmp_path):
        (tmp_path / "none").mkdir()
        with pytest.raises(ValueError, match=r"'none' is empty.*<label>/<image>"):
            domains.Domain.from_folder(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="absent does not exist"):
            domains.Domain.from_folder(tmp_path / "absent")

    def test_an_image_that_disappears_is_named(self, folder):
        domain = domains.Domain.from_folder(folder)
        (folder / "tit" / "2.png").unlink()
        with pytest.raises(ValueError, match=r"domain 'birds', example 'tit/2.png'.*No such file"):
            domain[2]


class TestTables:
    ROWS = (
        {"image": "a.png", "question": "Which?", "answer": "owl", "options": "owl|tit|wren"},
        {"image": "a.png", "question": "Is it an owl?", "answer": "yes", "options": "yes|no"},
        {"image": "b.png", "question": "Which?", "answer": "tit", "options": ""},
    )

    @pytest.fixture(autouse=True)
    def _images(self, tmp_path):
        for name in "ab":
            PIL.Image.new("RGB", (5, 5), "blue").save(tmp_path / f"{name}.png")

    def write(self, path, rows=ROWS, columns=("image", "question", "answer", "options")):
        if path.suffix == ".csv":
            lines = [",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]
        else:
            lines = []
            for row in rows:
                row = {c: row[c] for c in columns if row[c]}
                if "options" in row:
                    row["options"] = row["options"].split("|")
                lines.append(json.dumps(row))
        path.write_text("\n".join(lines) + "\n")
        return path

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_rows_of_one_image_are_one_example(self, tmp_path, kind):
        path = self.write(tmp_path / f"birds.{kind}")
        domain = getattr(domains.Domain, f"from_{kind}")(path)
        assert (domain.name, len(domain)) == ("birds", 2)
        assert [q.answer for q in domain[0].questions] == ["owl", "yes"]
        assert domain[0].questions[0].options == ("owl", "tit", "wren")
        assert domain[1].questions[0].options  # filled with other answers
        assert "tit" in domain[1].questions[0].options
        assert domain[1].image.getpixel((0, 0)) == (0, 0, 255)

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_missing_columns_are_named(self, tmp_path, kind):
        path = self.write(tmp_path / f"birds.{kind}", columns=("image", "answer"))
        with pytest.raises(ValueError, match=r"birds\..*lacks the .*\['question'\].*has \['image'"):
            getattr(domains.Domain, f"from_{kind}")(path)

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_empty_and_absent_files_are_named(self, tmp_path, kind):
        path = self.write(tmp_path / f"birds.{kind}", rows=())
        with pytest.raises(ValueError, match="domain 'birds' is empty"):
            getattr(domains.Domain, f"from_{kind}")(path)
        with pytest.raises(FileNotFoundError, match="absent"):
            getattr(domains.Domain, f"from_{kind}")(tmp_path / f"absent.{kind}")

    def test_an_empty_cell_is_named_with_its_line(self, tmp_path):
        rows = [self.ROWS[0], {**self.ROWS[2], "answer": ""}]
        path = self.write(tmp_path / "birds.csv", rows=rows)
        with pytest.raises(ValueError, match=r"birds\.csv, line 3 lacks the fields \['answer'\]"):
            domains.Domain.from_csv(path)

    def test_an_answer_outside_its_options_is_named_with_its_line(self, tmp_path):
        rows = [{**self.ROWS[0], "answer": "eagle"}]
        path = self.write(tmp_path / "birds.csv", rows=rows)
        with pytest.raises(ValueError, match=r"birds\.csv, line 2: .*'eagle' is not among"):
            domains.Domain.from_csv(path)

    @pytest.mark.parametrize("line", ["{", "[1]"])
    def test_a_line_that_is_no_object_is_named(self, tmp_path, line):
        (tmp_path / "birds.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=r"birds\.jsonl, line 2: not (a )?JSON"):
            domains.Domain.from_jsonl(tmp_path / "birds.jsonl")


def test_the_command_prints_counts_sources_and_licences(
    tmp_path, tiny_recipes, capsys, monkeypatch
):
    from experiments.domains import tables

    tables.run(None, str(tmp_path), str(tmp_path / "LICENCES.md"))
    printed = capsys.readouterr()
    assert re.search(r"\| objects +\| 8 +\| 12 +\| 4 ", printed.out)
    assert f"PyPI numpy {np.__version__}" in printed.out
    assert "'astronomy' is left out" in printed.err
    assert (tmp_path / "LICENCES.md").read_text().strip() in printed.out


@pytest.fixture(scope="module")
def built():
    found = {split: domains.embedded(split, root=USERS_ROOT) for split in domains.SPLITS}
    if len(found["test"]) < 5:
        pytest.skip(f"packages are missing; built were {list(found['test'])}")
    return types.SimpleNamespace(**found)


@pytest.mark.slow
class TestReal:
    """The embedded domains themselves, from the packages (or the cache of an earlier build)."""

    def test_counts_and_styles(self, built):
        assert list(built.test) == list(domains.EMBEDDED)
        for name in domains.EMBEDDED:
            assert 60 <= len(built.test[name]) <= 100
            assert 300 <= len(built.train[name]) <= 500
            for one in built.test[name]:
                assert {q.style for q in one.questions} == {*questions.STYLES}
                assert len(one.ask("choice").options) == 4
                assert one.image.size == (recipe.SIZE, recipe.SIZE)

    def test_no_near_copies_between_the_splits(self, built):
        for name in domains.EMBEDDED:
            test = np.stack([recipe.thumbnail(e.image)[0] for e in built.test[name]])
            for one in built.train[name]:
                alike = recipe.likeness(recipe.thumbnail(one.image), test)
                assert alike < recipe.NEAR_COPY + 0.005, (name, one.id)  # JPEG moves it a little

    def test_the_text_alone_does_not_answer_multiple_choice(self, built):
        for name in domains.EMBEDDED:
            seen = [e.label for e in built.train[name]]
            asked = [e.ask("choice") for e in built.test[name]]
            right = [max(q.options, key=seen.count) == q.answer for q in asked]
            assert np.mean(right) < 0.4  # 0.25 by chance
