"""The main study, whole, on a tiny model and folders of pictures."""

from __future__ import annotations

import json

import pytest

QUICK = "configs/embedded.py:quick"
SMALL = (
    "--config.train_per_domain=6", "--config.test_per_domain=4", "--config.lens_per_domain=4",
    "--config.controls=2", "--config.batch_size=4", "--config.modules=('lm', 'all')",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, execute):
    workdir = tmp_path_factory.mktemp("study") / "work"
    done = execute(command("domain_neurons", QUICK, workdir, *SMALL))
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


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
    assert len(rows) == 2 * 3 * (3 + 2)  # modules lm and all
    moved = [r for r in rows if r["neurons"] and r["module"] == "lm"]
    assert any(r["deviation"]["image"]["relative_l2"] > 0 for r in moved)
    for row in rows:
        if not row["neurons"]:
            assert row["difference"] == 0 and row["deviation"]["image"]["relative_l2"] == 0


def test_another_config_is_refused(finished, command, execute):
    again = execute(command("domain_neurons", QUICK, finished, *SMALL, "--config.seed=1"))
    assert again.returncode == 1
    assert "belongs to another config (it differs in seed)" in again.stderr.splitlines()[-1]


def test_unknown_field_is_named(command, execute, tmp_path):
    done = execute(command("domain_neurons", QUICK, tmp_path, "--config.tope_rate=0.1"))
    assert done.returncode != 0 and "tope_rate" in done.stderr


def test_one_domain_is_too_few(command, execute, tmp_path):
    done = execute(command("domain_neurons", QUICK, tmp_path / "work", *SMALL, count=1))
    assert done.returncode == 1 and "needs 2 or more" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_killed_and_restarted_ends_with_the_same_bytes(finished, command, survive, tmp_path):
    line = command("domain_neurons", QUICK, tmp_path / "work", *SMALL)
    survive(line, tmp_path / "work", finished)
    for name in ("results.json", "index.html"):
        assert (tmp_path / "work" / name).read_bytes() == (finished / name).read_bytes()
