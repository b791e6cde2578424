"""The main study, whole, on a tiny model and folders of pictures."""

from __future__ import annotations

import json
import re

import ml_collections
import numpy as np
import pytest

import mllm_jax as mj
from experiments import examples as examples_
from experiments.domain_neurons import context, evidence
from experiments.domain_neurons import study as study_
from experiments.running import cli
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import domain_neurons
from mllm_jax.analysis.stages import find_resampled
from mllm_jax.checkpoints import masks
from mllm_jax.data import domains

pytestmark = pytest.mark.slow

QUICK = "configs/embedded.py:quick"
SMALL = (
    "--config.train_per_domain=6", "--config.test_per_domain=4", "--config.lens_per_domain=4",
    "--config.controls=2", "--config.random_controls=1", "--config.entropy_controls=2", "--config.batch_size=3", "--config.modules=('lm', 'all')",
    # Many neurons of the tiny model fire at every image token: no rate is above a high bar.
    "--config.filter_rate=0.5", "--config.bar_rate=0.5",
    "--config.evidence_exact=1", "--config.shuffles=19", "--config.resamples=10", "--config.lens_sites=('resid_mid', 'mlp.out')",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, execute):
    work = tmp_path_factory.mktemp("study") / "work"
    done = execute(command("domain_neurons", QUICK, work, *SMALL))
    assert done.returncode == 0, done.stderr[-2000:]
    return work


def test_leaves_results_figures_tables_and_a_page(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["domains"] == ["reds", "greens", "blues"]
    assert set(results["modules"]) == {"vision", "projector", "lm"}
    assert results["modules"]["lm"] == {"site": "lm.mlp.act", "layers": 9, "width": 48}
    assert (finished / "index.html").stat().st_size > 1000
    assert list((finished / "figures").glob("*.png")) and list((finished / "tables").glob("*.csv"))
    assert json.loads((finished / "manifest.json").read_text())["model"]


def test_tokens_are_those_of_the_pictures(finished):
    """6 pictures of 17 CLIP tokens and 4 folded image tokens each: padding is not counted."""
    tokens = json.loads((finished / "results.json").read_text())["tokens"]
    assert tokens["vision"] == dict.fromkeys(("reds", "greens", "blues"), 6 * 17)
    assert tokens["projector"] == dict.fromkeys(("reds", "greens", "blues"), 6 * 4)


def test_selection_has_the_size_that_the_rates_ask_for(finished):
    selection = json.loads((finished / "results.json").read_text())["selection"]
    assert selection["lm"]["k"] == round(0.01 * 9 * 48)
    assert selection["vision"]["k"] == round(0.01 * 2 * 64)


def test_ablation_has_every_cell_and_its_controls(finished):
    rows = json.loads((finished / "results.json").read_text())["ablation"]
    assert len(rows) == 2 * 3 * (3 + 2 + 1 + 2)  # modules lm and all
    assert {(r["control"], r["draw"]) for r in rows if r["control"]} == {
        ("rate", 0), ("rate", 1), ("layer", 0), ("entropy", 0), ("entropy", 1),
    }  # fmt: skip
    for row in rows:
        for moved in row["deviation"].values():
            for measure in ("relative_l2", "cosine"):
                assert moved[f"{measure}_low"] <= moved[measure] <= moved[f"{measure}_high"]
    moved = [r for r in rows if r["neurons"] and r["module"] == "lm"]
    assert any(r["deviation"]["image"]["relative_l2"] > 0 for r in moved)
    for row in rows:
        if not row["neurons"]:
            assert row["difference"] == 0 and row["deviation"]["image"]["relative_l2"] == 0


def test_every_cell_is_tested_and_corrected(finished):
    results = json.loads((finished / "results.json").read_text())
    selected = [row for row in results["ablation"] if row["control"] is None]
    assert all(0 < row["p"] <= row["p_holm"] <= 1 for row in selected)
    assert all("p_holm" not in row for row in results["ablation"] if row["control"] is not None)
    families = {row["family"]: row for row in results["power"]}
    assert families["own"]["tests"] == 2 * 3 and families["other"]["tests"] == 2 * 6
    for row in selected:
        assert (row["family"] == "own") == (row["mask"] == row["data"])
    assert all(row["possible"] is row["likely"] is None for row in results["power"])  # 4 questions


def test_controls_match_the_rates_and_say_where_they_do_not(finished):
    """The rates anew from the counts in files and the masks that were written."""
    results = json.loads((finished / "results.json").read_text())
    rows = {(r["module"], r["data"], r["control"]): r for r in results["controls"]}
    stored = np.load(finished / "masks.npz")
    names = results["domains"]
    for module, shape in results["modules"].items():
        mask = next(v for k, v in stored.items() if k.startswith(shape["site"]) and v.dtype == bool)
        for d, name in enumerate(names):
            parts = [
                np.load(path) for path in (finished / "steps/counts/neutral").glob(f"{name}-*.npz")
            ]
            image = parts[0][f"{module}/kinds"] == "image"
            positive = sum(part[f"{module}/positive"][..., image].sum(-1) for part in parts)
            rate = positive / sum(part[f"{module}/tokens"][image].sum() for part in parts)
            if not mask[d].any():
                assert (module, name, "rate") not in rows
                continue
            row = rows[module, name, "rate"]
            assert row["rate"] == pytest.approx(rate[mask[d]].mean())
            assert row["neurons"] == mask[d].sum() and row["draws"] == 2
            missed = [abs(u["difference"] or 1) for u in row["unmatched"] if not u["missing"]]
            assert all(miss > 0.02 for miss in missed)
            if not row["unmatched"]:
                assert abs(row["rate"] - row["drawn_rate"]) <= 0.02


def test_deviations_by_layer_end_in_those_after_the_last_layer(finished):
    """The sums in the steps, layer by layer, and the effects after the last layer."""
    results = json.loads((finished / "results.json").read_text())
    layers = results["deviation_layers"]
    assert layers == list(range(9))  # a tiny model has fewer than asked for
    rows = {
        (r["module"], r["data"], r["control"], r["measure"], r["tokens"]): r
        for r in results["deviation_by_layer"]
    }
    assert len(rows) == 2 * 3 * (1 + 3) * 2 * len({r["tokens"] for r in rows.values()})
    for effect in results["effects"]:
        if effect["measure"] == "accuracy":
            continue
        named = effect["module"], effect["data"]
        own = rows[*named, None, effect["measure"], effect["tokens"]]
        drawn = rows[*named, effect["control"], effect["measure"], effect["tokens"]]
        assert own["value"][-1] == pytest.approx(effect["own"])
        assert drawn["value"][-1] == pytest.approx(effect["drawn"])
        assert drawn["difference"][-1] == pytest.approx(effect["difference"])
        for end in ("low", "high"):
            ends = drawn[f"difference_{end}"]
            assert effect[end] is None if ends is None else ends[-1] == pytest.approx(effect[end])
    parts = [np.load(path) for path in sorted((finished / "steps/ablation").glob("reds-*.npz"))]
    for module in ("lm", "all"):
        moved = np.concatenate([p[f"{module}-reds-selected/relative_l2"] for p in parts], -1)
        tokens = np.concatenate([p[f"{module}-reds-selected/tokens"] for p in parts], -1)
        want = moved[:, 0].sum(-1) / tokens[0].sum()
        assert rows[module, "reds", None, "relative_l2", "image"]["value"] == pytest.approx(want)


def test_effects_are_against_each_control_and_of_each_measure(finished):
    results = json.loads((finished / "results.json").read_text())
    cells = results["ablation"]
    for row in results["effects"]:
        if row["measure"] == "accuracy":
            of = [
                c for c in cells if (c["module"], c["data"]) == (row["module"], row["data"])
                and c["mask"] == c["data"]
            ]  # fmt: skip
            own = next(c["accuracy"] for c in of if c["control"] is None)
            drawn = [c["accuracy"] for c in of if c["control"] == row["control"]]
            assert row["difference"] == pytest.approx(own - np.mean(drawn))
            assert row["draws"] == len(drawn)
        single = row["draws"] == 1
        assert (row["low"] is None) == (row["p"] is None) == single
        if not single:
            assert row["low"] <= row["difference"] <= row["high"] and row["p_holm"] >= row["p"]
        verdict = row["verdict"]
        assert (verdict is None) == (row["p_equal"] is None) == single
        if not single and row["measure"] == "accuracy":
            # So few questions cannot show that nothing happens, even if none of them changes.
            assert row["p_equal"] >= 0.95 ** row["n"] and verdict in ("effect", "undecided")
    kinds = {(r["control"], r["measure"], r["tokens"]) for r in results["effects"]}
    assert {("rate", "accuracy", None), ("layer", "relative_l2", "image")} <= kinds


@pytest.mark.slow
def test_masks_are_written_and_read_back(finished, command, execute, tmp_path):
    """The second study takes the neurons of the first from its files and finds the same changes."""
    first = json.loads((finished / "results.json").read_text())
    for path in ("masks.npz", "masks/{module}.pth"):
        work = tmp_path / path[:5] / path[-3:]
        done = execute(
            command("domain_neurons", QUICK, work, *SMALL, f"--config.masks={finished / path}",
                    "--config.evidence_neurons=0")
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        second = json.loads((work / "results.json").read_text())
        assert second["ablation"] == first["ablation"] and second["selector"] == "given"
        assert second["stability"] == second["comparison"] == second["tokens"] == {}
    done = execute(
        command("domain_neurons", QUICK, tmp_path / "two", *SMALL,
                f"--config.masks={finished / 'masks.npz'}", count=2)
    )  # fmt: skip
    assert done.returncode == 1
    assert "has the domains ['reds', 'greens', 'blues'], not" in done.stderr.splitlines()[-1]


def test_what_the_selection_hangs_on(finished):
    results = json.loads((finished / "results.json").read_text())
    comparison = results["comparison"]
    assert comparison["selectors"] == ["entropy", "auroc", "difference", "random"]
    for shared in comparison["modules"].values():
        assert all(row[i][i] in (0.0, 1.0) for row in shared["jaccard"] for i in range(4))
    assert {(row["field"], row["value"]) for row in comparison["settings"]} == {
        ("prompts", "released"), ("scope", "all"), ("scope", "text"), ("thresholds", "global"),
        ("thresholds", "layer"), ("assign", "single"), ("compat", "official"),
    }  # fmt: skip
    text = next(row for row in comparison["settings"] if row["value"] == "text")
    # the tower reads no text: all its tokens count
    assert text["selected"]["vision"] == results["selection"]["vision"]["selected"]
    for module, test in results["stability"].items():
        assert test["examples"] == [1, 3] and test["beyond_chance"] >= 0, module
        assert test["beyond_chance"] <= results["selection"][module]["selected"]


def test_neurons_beyond_chance_are_written(finished):
    """The masks of both files, and the number of neurons that the results tell."""
    results = json.loads((finished / "results.json").read_text())
    selected, tested = (masks.load(finished / f"{name}.npz") for name in ("masks", "masks_tested"))
    for module, shape in results["modules"].items():
        beyond, test = tested.modules[shape["site"]], results["stability"][module]
        assert not (beyond & ~selected.modules[shape["site"]]).any()
        assert beyond.any(0).sum() == test["beyond_chance"]
        by_domain = [test["beyond_chance_per_domain"][name] for name in results["domains"]]
        assert beyond.sum((1, 2)).tolist() == by_domain
        path = finished / "masks_tested" / f"{module}.pth"
        assert (masks.read_pth(path, shape["width"], domains=3) == beyond).all()


@pytest.mark.slow
def test_neurons_beyond_chance_are_what_is_ablated(finished, command, execute, tmp_path):
    more = (
        "--config.ablate=tested", "--config.modules=('vision',)", "--config.level=0.5",
        "--config.evidence_neurons=0", "--config.controls=0",
    )  # fmt: skip
    done = execute(command("domain_neurons", QUICK, tmp_path / "work", *SMALL, *more))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "work/results.json").read_text())
    tested = masks.load(tmp_path / "work/masks_tested.npz").modules["vision.mlp.act"]
    assert tested.any() and results["ablated"] == "tested"
    own = [
        row for row in results["ablation"] if (row["module"], row["control"]) == ("vision", None)
    ]
    assert len(own) == 9
    for row in own:
        assert row["neurons"] == tested[results["domains"].index(row["mask"])].sum()


def test_selection_by_released_prompts_stands_beside(finished):
    """Against the masks that the counts in files give under both kinds of prompt."""
    results = json.loads((finished / "results.json").read_text())
    found, names = results["released"], results["domains"]
    assert found["own"] == {"prompts": "neutral", "scope": "image"}
    assert (found["prompts"], found["scope"]) == ("released", "all")
    selected = {}
    for prompts, scope in (("neutral", ("image",)), ("released", tok.kind)):
        positive, tokens = [], []
        for name in names:
            files = (finished / "steps/counts" / prompts).glob(f"{name}-*.npz")
            parts = [np.load(path) for path in files]
            chosen = np.isin(parts[0]["lm/kinds"], scope)
            positive.append(sum(part["lm/positive"][..., chosen].sum(-1) for part in parts))
            tokens.append(sum(part["lm/tokens"][chosen].sum() for part in parts))
        rates = {"filter_rate": 0.5, "bar_rate": 0.5}
        found_there = domain_neurons.select(np.stack(positive), np.array(tokens), **rates)
        selected[prompts] = found_there.mask
    both, either = (
        selected["neutral"] & selected["released"],
        selected["neutral"] | selected["released"],
    )
    of_lm = found["modules"]["lm"]
    assert of_lm["jaccard"] == pytest.approx(both.sum((1, 2)) / either.sum((1, 2)).clip(1))
    assert of_lm["selected"] == selected["released"].any(0).sum()
    assert results["selection"]["lm"]["selected"] == selected["neutral"].any(0).sum()
    # The tower reads no prompt.
    vision = found["modules"]["vision"]
    assert sum(vision["neurons_per_domain"].values()) > 0


def test_neutral_prompts_are_the_same_in_every_domain(folders, tmp_path):
    read = domains.load_user_domains(list(map(str, folders)), "train")
    by_domain = [context.NeutralQuestions(examples, 12) for examples in read.values()]
    prompts = [[question.prompt for _, question in pairs] for pairs in by_domain]
    assert prompts[0] == prompts[1] == prompts[2] and len(set(prompts[0])) == 8
    words = set(" ".join(prompts[0]).lower().replace("?", "").split())
    for examples in read.values():
        assert not words & {examples.name, *(example.label for example in examples)}


def test_every_site_of_the_lens_and_what_is_claimed_of_its_words(finished):
    """At the last layer the end of the block is the model's own distribution."""
    results = json.loads((finished / "results.json").read_text())
    assert set(results["lens_sites"]) == {"resid_mid", "mlp.out"}
    curves = [results["lens"], results["lens_top"], *results["lens_sites"].values()]
    assert all(len(of["reds"]["image"]["mean"]) == 9 for of in curves)
    assert all(0 < p < 1 for p in results["lens_top"]["reds"]["image"]["mean"])
    by_layer = results["lens_words"]
    assert len(by_layer) == 3 * 2 * 5 and {row["layer"] for row in by_layer} == {0, 2, 4, 6, 8}
    for row in by_layer:
        # The maximum of a mean is at most the mean of the maxima.
        top = results["lens_top"][row["data"]][row["tokens"]]["mean"][row["layer"]]
        assert row["probabilities"][0] <= top + 1e-6
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        assert row["tokens"] == "question" or row["n"] == 4 * 4  # folded tokens of 4 pictures
    rows = {(row["data"], row["measure"]): row for row in results["sparsity"]}
    for name in results["domains"]:
        stored = np.load(finished / f"steps/lens-{name}.npz")
        mean = stored["sums"][:, -1] / stored["tokens"]
        row = rows[name, "entropy"]
        assert row["value"] == pytest.approx((mean[:, 0] - mean[:, 1]).mean(), abs=1e-6)
        top = rows[name, "most likely word"]
        assert top["value"] == pytest.approx(results["lens_top"][name]["image"]["mean"][-1])
        # Four pictures cannot tell.
        assert row["verdict"] == top["verdict"] == "undecided" and row["p_holm"] >= row["p"]


def test_intervals_of_neuron_counts_are_over_groups_of_pictures(finished):
    stages = json.loads((finished / "results.json").read_text())["stages"]["neurons"]
    stored = np.load(finished / "steps/resamples-lm.npz")
    assert stored["per_layer"].shape == (10, 3, 9) and len(stored["domain"]) == 18
    found = find_resampled(neurons_by_layer(finished), stored["per_layer"].sum(1), examples=18)
    assert stages["verdict"] == found.verdict and stages["low"] == list(found.low)


def neurons_by_layer(finished):
    """Neurons of all domains by layer, in the file of masks."""
    return masks.load(finished / "masks.npz").modules["lm.mlp.act"].sum((0, 2))


def test_features_of_the_colours_lie_apart(finished):
    found = json.loads((finished / "results.json").read_text())["features"]
    assert found["vision"]["between"] > 0.5 and sum(found["vision"]["share"]) <= 1
    assert all(len(points) == 4 for points in found["projector"]["points"].values())


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"selector": "lape"}, "config.selector: 'lape' is not one of entropy, auroc"),
        ({"prompts": "plain"}, "config.prompts: 'plain' is not one of neutral, released"),
        ({"compat": "official"}, "follows the released code: set prompts='released', scope='all'"),
        ({"ablate": "tested", "selector": "auroc"}, "config.ablate='tested' ablates the neurons"),
        ({"lens_sites": ("mlp",)}, "config.lens_sites: 'mlp' is not one of resid_mid, attn_out"),
        ({"ablate": "some"}, "config.ablate: 'some' is not one of selected, tested"),
        ({"scope": "pad"}, "config.scope: 'pad' is not one of all, image, text"),
        ({"measure": "words"}, "config.measure: 'words' is not one of options, answers"),
        (
            {"measure": "answers"},
            "config.measure='answers' has metrics only for MMNeuron's data sets",
        ),
        ({"modules": ("lm", "query")}, "the model has no neurons in 'query'; it has vision, proj"),
        (
            {"masks": "neurons.pth"},
            "config.masks='neurons.pth': give FILE.npz, or FOLDER/{module}.pth",
        ),
    ],
)
def test_settings_that_are_none(fields, says, refuse):
    refuse(says, **fields)


def test_one_domain_is_too_few(refuse, folders):
    refuse("needs 2 or more", paths=(str(folders[0]),))


@pytest.fixture
def refuse(config_of, checkpoint, folders, tmp_path):
    """Starts the study in this process; it must end with an error of one line that says so."""

    def run(says: str, **fields):
        given = {"model": str(checkpoint), "paths": tuple(map(str, folders))} | fields
        with pytest.raises(cli.EXPECTED, match=re.escape(says)):
            study_.run(config_of(QUICK, **given), store.Workdir(tmp_path, {}))

    return run


def test_another_config_is_refused(finished, command, execute):
    again = execute(command("domain_neurons", QUICK, finished, *SMALL, "--config.seed=1"))
    assert again.returncode == 1
    assert "belongs to another config (it differs in seed)" in again.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("tope_rate", ' Did you mean "top_rate" instead of "tope_rate"?'),
        pytest.param("x", "", marks=pytest.mark.slow),
    ],
)
def test_unknown_field_is_named(field, near, command, execute, tmp_path):
    done = execute(command("domain_neurons", QUICK, tmp_path, f"--config.{field}=0.1"))
    said = f"error: the config has no field '{field}'; its file lists the fields.{near}"
    assert done.returncode == 1 and done.stderr.splitlines() == [said]


@pytest.mark.slow
def test_killed_and_restarted_ends_with_the_same_bytes(finished, command, survive, tmp_path):
    line = command("domain_neurons", QUICK, tmp_path / "work", *SMALL)
    survive(line, tmp_path / "work", finished)
    for name in ("results.json", "index.html"):
        assert (tmp_path / "work" / name).read_bytes() == (finished / name).read_bytes()


def evidence_of(work):
    return json.loads((work / "results.json").read_text())["evidence"]


def test_evidence_is_of_the_selected_neurons(finished):
    """Their domains are those of the masks, their rates those of the counts."""
    found, stored = evidence_of(finished), masks.load(finished / "masks.npz")
    assert found["neurons"] and list(stored.domains) == ["reds", "greens", "blues"]
    for neuron in found["neurons"]:
        module, at = neuron["module"], (neuron["layer"], neuron["index"])
        mask = stored.modules[f"{module}.act" if module == "projector" else f"{module}.mlp.act"]
        own = [name for d, name in enumerate(stored.domains) if mask[(d, *at)]]
        assert neuron["domains"] == own and own
        for name in stored.domains:
            groups = [np.load(path) for path in finished.glob(f"steps/counts/neutral/{name}-*.npz")]
            active = sum(group[f"{module}/positive"][at].sum() for group in groups)
            tokens = sum(group[f"{module}/tokens"].sum() for group in groups)
            assert neuron["rates"][name]["all"] == pytest.approx(active / tokens)
            assert sum(neuron["values"][name]) == tokens
            assert name in neuron["effects"] or not neuron["effects"]
    selected = {module: mask.any(0).sum() for module, mask in stored.modules.items()}
    assert len(found["neurons"]) == sum(selected.values())  # fewer than 20 of each


def test_single_neurons_are_tested_and_switched_off(finished):
    """The p-values of the shuffles, and an ablation by hand of the first neuron of each module."""
    found = evidence_of(finished)["neurons"]
    for module in ("vision", "lm"):
        shuffled = np.load(finished / f"steps/shuffles-{module}.npz")["shuffled"]
        for neuron in (n for n in found if n["module"] == module):
            as_low = (shuffled <= neuron["entropy"] + 1e-12).sum()
            assert neuron["p"] == pytest.approx((1 + as_low) / (1 + len(shuffled)))
    config = ml_collections.ConfigDict(json.loads((finished / "config.json").read_text()))
    model, processor = mj.load(config.model)
    train = examples_.domains_of(config, "train")
    tested = [n for n in found if n["exact"]]
    assert {n["module"] for n in tested} >= {"vision", "lm"}
    for neuron in (next(n for n in tested if n["module"] == m) for m in ("vision", "lm")):
        (name, value), *_ = neuron["exact"].items()
        asked = [train[name][i].ask(style) for i, style in zip(range(3), config.styles)]
        batch = processor([train[name][i].image for i in range(3)], [q.prompt for q in asked])
        site = {"vision": S.vision.mlp.act, "lm": S.lm.mlp.act}[neuron["module"]]
        off = mj.ablate(site[neuron["layer"], neuron["index"]])
        right = [[question.answer] for question in asked]
        change = np.subtract(*(np.asarray(mj.score(model, batch, right, e)) for e in (off, None)))
        assert value == pytest.approx(change.mean(), abs=1e-5)


def test_pages_show_the_pictures_of_the_evidence(finished):
    found = evidence_of(finished)
    assert all((finished / picture["image"]).is_file() for picture in found["pictures"])
    assert (finished / "neurons.html").is_file() and (finished / "pictures.html").is_file()
    for neuron in found["neurons"]:
        for token in neuron["top"]["image"]:
            assert 0 <= token["row"] < token["rows"] and 0 <= token["column"] < token["columns"]
            assert token["rows"] == (4 if neuron["module"] == "vision" else 2)
        values = [token["value"] for token in neuron["top"]["image"]]
        assert len(values) == evidence.TOP and values == sorted(values, reverse=True)
    picture = json.loads((finished / "results.json").read_text())["pictures"][0]
    assert picture["by_layer"]["layers"] == list(range(9))
    assert np.shape(picture["by_layer"]["words"]) == (9, 4, 5)


def test_changed_answers_are_counted(finished):
    """Scores differ only where answers do, and every answer is an option."""
    results = json.loads((finished / "results.json").read_text())
    rows = [row for row in results["ablation"] if row["control"] is None]
    assert {len(asked) for asked in results["questions"].values()} == {4}
    for row in rows:
        assert len(row["changed"]) == row["changes"] <= 4
        total = sum(after - before for before, after in (c["scores"] for c in row["changed"]))
        assert total / 4 == pytest.approx(row["difference"])
        assert all(c["before"] != c["after"] for c in row["changed"])


@pytest.mark.slow
def test_strongest_tokens_are_those_of_kept_activations(finished):
    """Against a loop over all activations of all pictures, and the head's own product."""
    config = ml_collections.ConfigDict(json.loads((finished / "config.json").read_text()))
    model, processor = mj.load(config.model)
    train, values, places = examples_.domains_of(config, "train"), [], []
    for name, domain in train.items():
        pairs = context.NeutralQuestions(domain, 6)
        for number, (example, question) in enumerate(pairs):
            batch = processor([example.image], [question.prompt])
            out = mj.run(model, batch, None, {"act": mj.keep(S.lm.mlp.act)}, logits="none")
            is_image = np.asarray(batch.tokens.kind)[0] == tok.CODE["image"]
            values.append(np.asarray(out["act"], np.float32)[:, 0, is_image])
            places += [(name, number, i // 2, i % 2) for i in range(4)]
    every = np.concatenate(values, axis=1)  # [L, tokens, F]
    head = np.asarray(model.lm.embed[...], np.float64)
    down = np.asarray(model.lm.layers.mlp.down.kernel[...], np.float64)
    found = evidence_of(finished)
    compared = [neuron for neuron in found["neurons"] if neuron["module"] == "lm"]
    for neuron in compared:
        own = every[neuron["layer"], :, neuron["index"]]
        best = np.argsort(-own, kind="stable")[: evidence.TOP]
        shown = [token["value"] for token in neuron["top"]["image"]]
        np.testing.assert_allclose(shown, own[best], rtol=1e-4, atol=1e-5)
        first, picture = neuron["top"]["image"][0], found["pictures"]
        if own[best[0]] - own[best[1]] > 1e-3:
            shown_at = picture[first["picture"]]
            place = shown_at["domain"], shown_at["example"], first["row"], first["column"]
            assert place == places[best[0]]
        direction = down[neuron["layer"], neuron["index"]] * np.asarray(model.lm.norm.scale[...])
        raised = processor.word(int((head @ direction).argmax()))
        assert neuron["words"]["raised"][0] == raised
    assert compared
