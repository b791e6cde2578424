import csv
import json

import numpy as np
import pytest
from PIL import Image

from experiments.projection.report import page as report
from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PROJ
from mllm_jax.report import page, style
from tests.helpers import fake_projection
from tests.helpers.html_reader import Reader

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def results():
    return json.loads(json.dumps(fake_projection.fake_results()))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, results):
    folder = tmp_path_factory.mktemp("study")
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text("{}")
    report.write(folder, results)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not rendered: the page does not look at them."""
    monkeypatch.setattr(style, "save", lambda figure, path: None)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_link_leads_to_a_file(folder):
    reader = Reader((folder / "index.html").read_text(encoding="utf-8"))
    assert reader.open == []
    links = {link for link in reader.links if not link.startswith("#")}
    assert set(contents(folder)) == links | {"index.html"}
    assert reader.tags.count("section") == 11
    for path in (folder / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 1000


def test_tables_hold_the_numbers_exactly(folder, results):
    for name in ("answers", "richness"):
        for row, want in zip(rows(folder / f"tables/{name}.csv"), results[name], strict=True):
            assert float(row["f1_mean"]) == want["f1"]["mean"]
            assert float(row["accuracy_low"]) == want["accuracy"]["low"]
            change = want["change"]
            assert row["change_value"] == ("" if change is None else str(change["value"]))
            assert row["f1_deviation"] == str(want["f1"]["deviation"] or "").replace("None", "")
    counts = {name: len(rows(folder / f"tables/{name}.csv")) for name in
              ("claims", "depth", "factors", "neurons", "neurons_per_layer", "ablation",
               "suppression")}  # fmt: skip
    compared = [c for r in results["claims"] + results["controls"] for c in r["comparisons"]]
    assert counts == {
        "claims": len(compared), "depth": 4 * 3 * 2 * 30, "factors": 28, "neurons": 32,
        "neurons_per_layer": 16 * 31, "ablation": 16, "suppression": 4,
    }  # fmt: skip


def test_sentences_follow_from_the_numbers(folder, results):
    text = (folder / "index.html").read_text(encoding="utf-8")

    def mean(name, variant, probe=None):
        own = [row["f1"]["mean"] for row in results[name]
               if row["variant"] == variant and row.get("probe") == probe]  # fmt: skip
        return f"{np.mean(own):.2f}"

    answers = [mean("answers", v) for v in (ORIGINAL, PROJ, E2E)]
    assert f"macro-F1 is {answers[0]} on average over tasks" in text
    assert f"projector tuned {answers[1]}, tuned end to end {answers[2]}." in text
    assert "above zero in 4 of 4 tasks for FT-Proj, in 4 for FT-E2E" in text
    sides = [mean("richness", v, "matched") for v in (BEFORE, ORIGINAL)]
    assert f"for both sides, {sides[0]} before and {sides[1]} after it" in text
    verdicts = [row["verdict"] for row in results["claims"]]
    held, undecided = verdicts.count("holds"), verdicts.count("undecided")
    assert f"holds {held}, fails 0, undecided {undecided}." in text
    assert "not measured: CLIP zero-shot" in text
    assert "config.clip names no CLIP with a text tower" in text
    assert "There is one seed" not in text and "is not naive" not in text
    kept = [r["kept"] for r in results["neurons"]
            if (r["task"], r["variant"], r["module"]) == ("digits", E2E, "lm")]  # fmt: skip
    assert len(kept) == 2 and "Means over 2 fine-tunings of each kind" in text
    assert f">{np.mean(kept):,.0f} ({min(kept)}{page.DASH}{max(kept)})<" in text
    for row in results["claims"]:
        assert row["criterion"] in text and row["power"] in text
    assert "0.1064 / 0.1255" in text and "0.6991 / 0.7118" in text  # the paper's own


def test_with_clip_nothing_is_missing(tmp_path, undrawn, results):
    rows = [row | {"variant": CLIP, "runs": 1, "change": None, "f1": row["f1"] | {"deviation": None}}
            for row in results["answers"] if row["variant"] == ORIGINAL]  # fmt: skip
    report.write(tmp_path, {**results, "answers": [*rows, *results["answers"]]})
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"<td>{CLIP}" in text and "config.clip" not in text


@pytest.mark.slow
def test_written_again_the_bytes_are_the_same(tmp_path, results, folder, monkeypatch):
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 40)  # quicker
    report.write(tmp_path, results)
    first = contents(tmp_path)
    report.write(tmp_path, results)
    assert contents(tmp_path) == first


@pytest.mark.parametrize(
    "part, sections",
    [
        ("controls", 11),
        ("depth", 10),
        ("factors", 10),
        ("neurons", 10),
        ("changed", 10),
        ("trained", 10),
        ("ablation", 9),
    ],
)
def test_a_study_that_lacks_a_part(tmp_path, undrawn, results, part, sections):
    report.write(tmp_path, {key: value for key, value in results.items() if key != part})
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert Reader(text).tags.count("section") == sections
    assert "nan" not in text


def test_a_study_of_one_task_one_seed_and_one_probe(tmp_path, undrawn, results):
    some = {
        **results,
        "answers": [row for row in results["answers"] if row["task"] == "digits"],
        "richness": [row for row in results["richness"]
                     if (row["task"], row["probe"]) == ("digits", "paper")],
        "factors": [row | {"probe": None} for row in results["factors"] if row["task"] == "digits"],
    }  # fmt: skip
    report.write(tmp_path, some)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "for both sides" not in text and page.DASH in text


def test_one_seed_and_a_projector_that_saw_the_domains_are_told(tmp_path, undrawn, results):
    report.write(tmp_path, {**results, "seeds": [3], "model": "embedded"})
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "There is one seed (3): the intervals are over pictures only" in text
    assert "Original is not naive" in text
    report.write(tmp_path, {**results, "model": "embedded", "projector": "without_objects.npz"})
    assert "is not naive" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_missing_keys_are_named(tmp_path, results):
    some = {key: value for key, value in results.items() if key not in ("rule", "answers")}
    with pytest.raises(ValueError, match="lacks answers, rule; run the study again"):
        report.write(tmp_path, some)
    assert not list(tmp_path.iterdir())
