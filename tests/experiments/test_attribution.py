"""The attribution study on a tiny model: its numbers are those of `jax.grad` by hand."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mllm_jax as mj
from experiments.attribution import study as attribution
from mllm_jax import sites as S
from mllm_jax.data import batching, domains
from mllm_jax.passes import score

CONFIG = "configs/embedded_attribution.py:quick"
SMALL = (
    "--config.train_per_domain=3", "--config.test_per_domain=3", "--config.batch_size=2",
    "--config.styles=('category',)", "--config.off=(5,40)",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, execute):
    workdir = tmp_path_factory.mktemp("attribution") / "work"
    done = execute(command("attribution", CONFIG, workdir, *SMALL, "--config.steps=64", count=2))
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


@pytest.mark.slow
def test_leaves_results_tables_figures_and_a_page(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["domains"] == ["reds", "greens"]
    assert (results["layers"], results["units"]) == (9, 48)
    assert results["examples"] == {"reds": 3, "greens": 3}
    for name in ("index.html", "figures/by_layer.png", "figures/ablation.png", "manifest.json",
                 "tables/by_layer.csv", "tables/top_units.csv", "tables/ablation.csv"):  # fmt: skip
        assert (finished / name).stat().st_size > 100
    assert len(results["ablation"]) == 2 * 2 * 2  # domains, numbers of units, top and random
    layer, unit, value = results["top"]["reds"][0]
    with np.load(finished / "attribution.npz") as found:
        assert found["reds"].max() == found["reds"][layer, unit] == value > 0


@pytest.mark.slow
def test_attributions_add_up(finished):
    """To what closing all gates takes away."""
    for found in json.loads((finished / "results.json").read_text())["completeness"].values():
        assert abs(found["change"]) > 1e-3
        assert abs(found["sum"] - found["change"]) < 0.02 * abs(found["change"])


@pytest.mark.slow
def test_they_are_gradients_on_the_way(finished, checkpoint, folders):
    model, processor = mj.load(checkpoint)
    domain = domains.load_user_domains([str(f) for f in folders[:2]], "train")["greens"]
    pairs = batching.ask(list(domain)[:3], ("category",))
    batch = processor([e.image for e, _ in pairs], [q.prompt for _, q in pairs])
    options = [(q.answer, next(o for o in q.options if o != q.answer)) for _, q in pairs]

    @jax.jit
    @jax.grad
    def slope(gates):
        scores = mj.score(model, batch, ids, mj.scale(S.lm.mlp.act, gates))
        return (scores[:, 0] - scores[:, 1]).mean()

    ids = score.candidate_ids(processor, options, 3)
    shares = (np.arange(64) + 0.5) / 64
    want = np.mean([slope(np.full((9, 48), share, np.float32)) for share in shares], 0)
    with np.load(finished / "attribution.npz") as found:
        np.testing.assert_allclose(found["greens"], want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"metric": "loss"}, "config.metric: 'loss' is not one of answer, difference"),
        ({"site": "lm.mlp.akt"}, "unknown site 'lm.mlp.akt'; nearest: lm.mlp.act"),
    ],
)
def test_errors_come_before_anything_is_read(field, says, config_of):
    config = config_of(CONFIG, model="nowhere", **field)
    with pytest.raises((ValueError, KeyError), match=says):
        attribution.run(config, None)
