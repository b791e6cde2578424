import copy
import csv
import json
import re
from unittest import mock

import numpy as np
import pytest

from experiments import context
from experiments.domain_neurons.report import ablation, robustness, selection
from experiments.domain_neurons.report import page as report
from mllm_jax import store
from mllm_jax.report import page, style
from tests.helpers import fake_study
from tests.helpers.html_reader import Reader

pytestmark = pytest.mark.filterwarnings("error")


def study(folder, **options):
    results = json.loads(json.dumps(fake_study.fake_results(**options)))
    fake_study.write_pictures(folder, results)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text("{}")
    return results


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    results = study(folder, grids=(7, 4))
    report.write(folder, results)
    return folder, results


def page_of(folder, name):
    return Reader((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not rendered: the page does not look at them."""
    monkeypatch.setattr(style, "save", lambda figure, path: None)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_link_leads_to_a_file(written):
    folder, _ = written
    pages = {path.name: page_of(folder, path.name) for path in folder.glob("*.html")}
    assert set(pages) == {"index.html", "neurons.html", "pictures.html"}
    assert all(reader.open == [] for reader in pages.values())
    links = {link.partition("#")[0] for reader in pages.values() for link in reader.links} - {""}
    assert links and all((folder / link).is_file() for link in links)
    made = {name for name in contents(folder) if not name.startswith("figures/picture")}
    assert made == {link for link in links if not link.startswith("figures/picture")}
    assert pages["index.html"].tags.count("section") == 18


def test_figures_are_png_of_a_legible_size(written):
    for path in (written[0] / "figures").glob("*.png"):
        with fake_study.Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 224


def test_tables_hold_the_numbers_exactly(written):
    folder, results = written
    table = rows(folder / "tables/ablation.csv")
    assert len(table) == len(results["ablation"])
    for row, run in zip(table, results["ablation"], strict=True):
        assert float(row["difference"]) == run["difference"]
        assert row["control"] == (run["control"] or "")
        assert row["draw"] == ("" if run["draw"] is None else str(run["draw"]))
    per_layer = rows(folder / "tables/neurons_per_layer.csv")
    assert len(per_layer) == 5 * (11 + 1 + 30)
    assert sum(int(row["neurons"]) for row in per_layer) == sum(
        sum(found["neurons_per_domain"].values()) for found in results["selection"].values()
    )
    undecided = rows(folder / "tables/stages.csv")[4]
    assert (undecided["first"], undecided["first_low"], undecided["second_high"]) == ("", "4", "26")
    assert {path.name for path in (folder / "tables").glob("*.csv")} == {
        "ablation.csv", "accuracy.csv", "changed_answers.csv", "claims.csv", "controls.csv", "deviation.csv",
        "deviation_by_layer.csv",
        "domains_per_neuron.csv", "effects.csv", "features.csv", "lens.csv", "lens_sites.csv", "lens_top.csv", "lens_words.csv", "neurons_per_layer.csv",
        "overlap.csv", "power.csv", "released.csv", "selection.csv", "selectors.csv", "settings.csv",
        "single_neurons.csv", "stages.csv", "sparsity.csv", "stability.csv", "tokens.csv",
    }  # fmt: skip


def test_deviation_by_layer_has_every_interval(written):
    folder, results = written
    table = rows(folder / "tables/deviation_by_layer.csv")
    assert len(table) == len(results["deviation_by_layer"]) * len(results["deviation_layers"])
    of = [r for r in table if (r["module"], r["data"], r["measure"]) == ("lm", "objects", "cosine")]
    own, matched = (
        next(r for r in of if (r["control"], r["layer"]) == (c, "29")) for c in ("", "rate")
    )
    assert (own["value"], own["low"], own["difference"]) == ("0.2", str(0.9 * 0.2), "")
    assert (
        float(matched["difference_low"]) == pytest.approx(0.3 * 0.2 - 0.01) and not matched["low"]
    )
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "In 0 of 5 domains the interval of own less rate-matched lies above" in text
    assert "objects +0.070 at layer 29" in text
    # 0.3 x 0.01 - 0.01 is below zero, and 0.5 x 0.01 - 0.01 too: at the first layer own moves less.
    assert re.search(r"objects</t[dh]>\s*<td[^>]*>7</td>\s*<td[^>]*>6</td>\s*<td[^>]*>1</td>", text)


def test_words_of_mean_distributions(written):
    folder, results = written
    table = rows(folder / "tables/lens_words.csv")
    assert len(table) == 3 * len(results["lens_words"])
    assert (table[1]["word"], table[1]["rank"], table[1]["probability"]) == ("<b>", "2", "0.125")
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "the 0.250, &lt;b&gt; 0.125, ↵ 0.062" in text
    assert "is highest at objects “the” (25\N{NO-BREAK SPACE}%)" in text


def test_tables_are_also_written_for_latex(written):
    folder, results = written
    latex = (folder / "tables/single_neurons.tex").read_text()
    assert latex.count(r" \\") == 1 + len(results["evidence"]["neurons"])
    assert r"\textless{}i\textgreater{}sky" in latex and "<" not in latex


def test_a_cell_of_the_matrix_leads_to_its_changed_answers(written):
    folder, results = written
    text = (folder / "index.html").read_text(encoding="utf-8")
    cells = re.findall(r'"customdata":(\[\[.*?\]\])', text)
    ids = [cell for panel in cells for row in json.loads(panel) for cell in row]
    selected = [run for run in results["ablation"] if run["control"] is None]
    assert len(ids) == len(set(ids)) == len(selected)
    assert all(text.count(f'<details id="{cell}">') == 1 for cell in ids)
    assert "a &lt;cat&gt; &amp; $x$" in text
    table = rows(folder / "tables/changed_answers.csv")
    assert len(table) == len(selected) and table[0]["after"] == "a <cat> & $x$"


def test_every_neuron_has_its_evidence(written):
    folder, results = written
    text = (folder / "neurons.html").read_text(encoding="utf-8")
    index = (folder / "index.html").read_text(encoding="utf-8")
    for neuron in results["evidence"]["neurons"]:
        name = f"{neuron['module']}-{neuron['layer']}-{neuron['index']}"
        assert f'<section id="{name}" class="alone">' in text
        assert f'<a href="neurons.html#{name}">' in index
    assert 'style="left:25.000%;top:25.000%;width:12.500%;height:25.000%"' in text
    assert (
        "<code>&lt;i&gt;sky</code>" in text and "Is it &lt;b&gt;<code>\N{OPEN BOX}</code>" in text
    )
    assert "own domains: 90.000% of 100 values from -1 to 0" in text
    table = rows(folder / "tables/single_neurons.csv")
    assert len(table) == 3 * 5 * 2 and float(table[0]["rate"]) == 0.1
    assert float(table[0]["p"]) == 0.015 and float(table[2]["effect"]) == pytest.approx(-0.013)
    assert "Over 6 neurons, estimated and measured effects have a correlation of 0.9" in index


def test_two_domains_of_a_handful_of_neurons_are_not_called_close(tmp_path, undrawn):
    results = study(tmp_path, grids=(2,))
    found = results["selection"]["projector"]
    found["overlap"] = np.ones_like(found["overlap"]).tolist()
    found["neurons_per_domain"] = dict.fromkeys(results["domains"], 2)
    section = selection.overlap(tmp_path, results)
    assert "1.00" not in section.reading and "common neurons of" in section.reading


def test_what_few_questions_cannot_tell_is_not_of_the_deepest_colour(written):
    _, results = written
    largest = max(abs(run["difference"]) for run in results["ablation"])
    assert ablation.colour_bound(results) == max(largest, 0.046)
    few = results | {"power": [results["power"][0] | {"possible": None}]}
    assert ablation.colour_bound(few) == 1.0


def test_too_few_groups_are_told_as_such(tmp_path):
    results = study(tmp_path)
    for test in results["stability"].values():
        test.update(lowest_entropy=None, shuffled_entropy=None, beyond_chance=None)
    section = robustness.stability(tmp_path, results)
    assert section.reading.startswith("These are too few groups of examples to tell")
    assert {row[-1] for row in section.table.rows} == {page.DASH}


def test_sentences_follow_from_the_numbers(written):
    folder, results = written
    text = (folder / "index.html").read_text(encoding="utf-8")
    own, matched, random = (
        [
            run
            for run in results["ablation"]
            if run["module"] == "all" and run["mask"] == run["data"] and run["control"] == control
        ]
        for control in (None, "rate", "layer")
    )

    def points(runs):
        change = 100 * np.mean([run["difference"] for run in runs])
        return f"{change:+.1f}".replace("-", page.MINUS)

    def moved(runs):
        return np.mean([run["deviation"]["image"]["relative_l2"] for run in runs])

    stars = sum(run["p_holm"] <= 0.05 for run in own)
    assert f"changes by {points(own)} points" in text
    assert f"rate-matched neurons: {points(matched)}, random neurons: {points(random)}" in text
    assert f"Domains with a change beyond chance: {stars} of 5." in text
    assert "Other than that of rate-matched neurons: 3 of 5." in text
    assert "Other than that of random neurons: 3 of 5." in text
    assert "active on 94\N{NO-BREAK SPACE}% of their domain's tokens" in text.replace("&#x27;", "'")
    assert "random neurons on 44\N{NO-BREAK SPACE}%" in text
    assert "In 5 of 135 layers" in text and "the controls miss, by up to 11 points" in text
    assert f"{page.MINUS}5.0 [{page.MINUS}10.0, +0.0]" in text
    assert "20 tests with own neurons, 240 questions: 4.2 points at the least" in text
    told = [
        f"{results['stability'][module]['beyond_chance']:,} of "
        f"{results['selection'][module]['selected']:,} in the {title}"
        for module, title in (
            ("vision", "vision encoder"), ("projector", "projector"), ("lm", "language model"),
        )
    ]  # fmt: skip
    assert f"{told[0]}, {told[1]} and {told[2]} have a lower entropy than" in text
    assert "AUROC shares most neurons with entropy: a Jaccard index of 0.30" in text
    assert "One of the two boundaries meets one in the number of neurons by layer" in text
    assert "60\N{NO-BREAK SPACE}% in the vision encoder and 60" in text
    assert f"by {moved(own):.2f} of their norm; rate-matched neurons, by" in text
    assert f"by {moved(matched):.2f}; random neurons, by {moved(random):.2f}" in text
    assert "beats chance in 5 of 5 domains" in text
    assert "best in astronomy (82\N{NO-BREAK SPACE}%" in text
    assert "boundaries are decided in 4 of 5 domains" in text
    assert "a ball &lt;round&gt;" in text and "A ball &amp; its shadow." in text


@pytest.mark.slow
def test_written_again_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 40)  # quicker
    results = study(tmp_path, domains=["cats", "dogs"], grids=(4,))
    report.write(tmp_path, results)
    first = contents(tmp_path)
    assert len(first) > 15
    report.write(tmp_path, results)
    assert contents(tmp_path) == first


def without(key):
    def change(results):
        results[key] = type(results[key])()

    return change


def without_controls(results):
    results["controls"], results["effects"] = [], []
    results["deviation_by_layer"] = [r for r in results["deviation_by_layer"] if not r["control"]]
    results["ablation"] = [run for run in results["ablation"] if run["control"] is None]


def without_power(results):
    for row in (*results["power"], *results["effects"]):
        row.update(possible=None, likely=None)
    for row in results["effects"]:
        row.update(low=None, high=None, p=None, p_holm=None, p_equal=None, verdict=None)
    for row in results["deviation_by_layer"]:
        row.update(difference_low=None, difference_high=None)
    for run in results["ablation"]:
        run["p_holm"] = 1.0


def with_one_cell_only(results):
    results["controls"], results["effects"], results["power"] = [], [], results["power"][:1]
    results["ablation"], results["deviation_by_layer"] = results["ablation"][:1], []


def without_deviation(results):
    for run in results["ablation"]:
        run["deviation"] = {}
    results["deviation_by_layer"] = []


def without_neurons(results):
    for found in results["selection"].values():
        found.update(selected=0, share=0.0, domains_per_neuron={})
        found["neurons_per_domain"] = dict.fromkeys(found["neurons_per_domain"], 0)
        found["per_layer"] = {d: [0] * len(n) for d, n in found["per_layer"].items()}
        found["overlap"] = np.zeros_like(found["overlap"]).tolist()


def without_stages(results):
    nothing = {"boundaries": None, "low": None, "high": None, "verdict": "undecided: 4 layers",
               "bends": [], "confirmed": None, "claimed": False}  # fmt: skip
    results["stages"] |= {"all": nothing, "text": nothing, "neurons": nothing, "agreement": None}
    results["stages"]["by_domain"] = dict.fromkeys(results["domains"], nothing)


def of_given_neurons(results):
    results["selector"] = "given"
    for found in results["selection"].values():
        found.update(threshold=None, bar=[0.5, 0.6])
    for score in results["baseline"].values():
        score["chance"] = None


def in_parts(results):
    for shown in results["pictures"]:
        shown["parts"] = {
            "words": [[["a"] * 30] * 20] * 3, "entropy": np.ones((3, 20, 30)).tolist(),
        }  # fmt: skip


@pytest.mark.parametrize(
    "changes, sections",
    [
        ((without_controls, without_stages), 17),
        ((with_one_cell_only, without_neurons, without("evidence")), 15),
        ((without_deviation, without("pictures")), 15),
        (
            (
                without("ablation"),
                without("baseline"),
                without("effects"),
                without("power"),
                without("deviation_by_layer"),
            ),
            13,
        ),
        (
            (
                without("lens"),
                without("stability"),
                without("comparison"),
                without("released"),
                without("sparsity"),
                without("lens_sites"),
                without("lens_words"),
            ),
            11,
        ),
        ((of_given_neurons, in_parts, without("controls")), 18),
        ((without_power,), 18),
    ],
    ids=[
        "controls, stages",
        "cells, neurons",
        "deviation, pictures",
        "ablation, baseline",
        "lens",
        "neurons of a file, parts",
        "power",
    ],
)
def test_a_study_that_lacks_a_part(tmp_path, undrawn, changes, sections):
    results = study(tmp_path, domains=["cats", "dogs"], grids=(2,))
    for change in changes:
        change(results)
    report.write(tmp_path, results)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert Reader(text).tags.count("section") == sections
    assert "nan" not in text.replace("Nan", "")


FIRST = (
    "format", "study", "model", "domains", "selector", "modules", "tokens", "selection", "stability",
    "released", "ablated", "controls", "pictures",
)  # fmt: skip
LENS = ("lens", "lens_top", "lens_words", "lens_sites", "sparsity", "stages", "features")


def test_the_page_grows_while_the_study_runs(tmp_path, undrawn):
    results, sections, known = study(tmp_path, grids=(2,)), [], {}
    for names in (FIRST, LENS, ("comparison", "evidence")):
        known |= {name: results[name] for name in names}
        report.preview(tmp_path, known)
        text = (tmp_path / "index.html").read_text(encoding="utf-8")
        assert "The study is still running" in text and 'http-equiv="refresh"' in text
        assert "nan" not in text.replace("Nan", "") and "results.json" not in text
        sections.append(Reader(text).tags.count("section"))
    report.write(tmp_path, results)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "is still running" not in text and "http-equiv" not in text
    assert sections == [5, 10, 12] and Reader(text).tags.count("section") == 18


def test_a_finished_page_is_no_preview_again(tmp_path, monkeypatch):
    def preview(results):
        context.Context.preview(one, results, lambda folder, found: written.append(found))

    one, written = mock.Mock(workdir=store.Workdir(tmp_path, {}), _with_items=dict), []
    preview({"a": 1})
    (tmp_path / "index.html").write_text("")
    preview({"a": 1, "b": 2})
    assert written == [{"a": 1}], "within a minute"
    monkeypatch.setattr(context, "PREVIEW_SECONDS", 0)
    preview({"a": 1, "b": 2})
    (tmp_path / "results.json").write_text("")
    preview({"a": 1, "b": 2, "c": 3})
    assert written == [{"a": 1}, {"a": 1, "b": 2}]


def test_what_could_not_be_found_is_said(tmp_path, undrawn):
    """8 questions and 25 cells: "0 of 5 beyond chance" would pass for absence."""
    results = study(tmp_path, grids=(2,))
    without_power(results)
    report.write(tmp_path, results)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Domains with a change beyond chance: could not have been found." in text
    assert "neurons: could not have been found." in text and "0 of 5" not in text
    for row in results["power"]:
        row.update(possible=0.2, likely=0.24)
    report.write(tmp_path, results)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "none of 5; below 20.0 points could not have been found" in text


def test_missing_keys_are_named(tmp_path):
    results = copy.deepcopy(fake_study.fake_results(grids=()))
    del results["lens"], results["stages"]
    with pytest.raises(ValueError, match="lacks lens, stages; run the study again"):
        report.write(tmp_path, results)
    assert not list(tmp_path.iterdir())


def test_a_missing_picture_is_named(tmp_path, undrawn):
    results = fake_study.fake_results(domains=["cats", "dogs"], grids=(2,))
    with pytest.raises(FileNotFoundError, match=r"picture of cats/0000 is missing.*picture-0\.png"):
        report.write(tmp_path, results)
