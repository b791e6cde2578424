"""The dictionary of a tiny model: its results add up, and it can be read and killed."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mllm_jax as mj
from experiments.dictionary import study as dictionary
from mllm_jax.store import Workdir, stamps
from mllm_jax.training import dictionaries
from tests.helpers import in_process, studies, tiny

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise, each with a question whose answers the tiny tokenizer knows."""
    images, labels = (tiny.picture(i) for i in range(32)), ("not", "tree", "which")
    return in_process.write_questions(tmp_path_factory.mktemp("pictures"), images, labels)


@pytest.fixture(scope="module")
def study(config_of, tiny_config, tiny_model, pictures):
    """Runs the study of the tiny model in this process; its folder."""
    name, fields = studies.STUDIES["dictionary"]

    def run(folder, **more):
        config = config_of(name, paths=(pictures,), model="tiny", **fields | more)
        loaded = tiny_model, tiny.processor(tiny_config)
        return in_process.run(dictionary, config, folder, loaded)

    return run


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    return study(tmp_path_factory.mktemp("dictionary") / "whole")


@pytest.mark.slow
def test_results_are_those_of_the_dictionary_that_is_written(whole):
    results = json.loads((whole / "results.json").read_text())
    written = mj.load_dictionary(whole / "dictionary")
    assert written.widths == (32, 24, 32)
    for kind in ("image", "text"):
        vectors = mj.read_collection(whole / "activations/test")[kind][:].value
        x = vectors.astype(np.float64)
        z = np.asarray(written.encode(vectors.astype(np.float32)), np.float64)
        y = z @ np.asarray(written.decoder) + np.asarray(written.decoder_bias)
        found = results["fidelity"][kind]
        explained = 1 - ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert found["explained"] == pytest.approx(explained, abs=1e-4)
        assert found["active"] == pytest.approx((z > 0).sum(1).mean())
        assert found["dead"] == pytest.approx((z == 0).all(0).mean())
        assert results["vectors"][kind] == len(x)
    losses = results["losses"]["image"]
    share = (losses["mean_loss"]["zero"] - losses["mean_loss"]["spliced"]) / (
        losses["mean_loss"]["zero"] - losses["mean_loss"]["clean"]
    )
    assert losses["recovered"]["zero"]["value"] in (None, pytest.approx(share, rel=1e-3))
    for name in ("index.html", "figures/training.png", "manifest.json", "tables/held_out.csv",
                 "tables/strongest.csv", "tables/training.csv"):  # fmt: skip
        assert (whole / name).stat().st_size > 20


@pytest.mark.slow
def test_the_strongest_tokens_of_a_latent_are_those_of_a_pass(whole):
    """The first token that the page shows has this value at this place."""
    results = json.loads((whole / "results.json").read_text())
    written = mj.load_dictionary(whole / "dictionary")
    places = mj.read_collection(whole / "activations/train")["image"][:]
    values = np.asarray(written.encode(places.value.astype(np.float32)))
    energy = (values.astype(np.float64) ** 2).sum(0)
    assert len(results["strongest"]) == 2
    for entry in results["strongest"]:
        own = values[:, entry["latent"]]
        assert entry["rate"] == pytest.approx((own > 0).mean())
        assert entry["energy"] == pytest.approx(energy[entry["latent"]] / energy.sum())
        first = entry["top"][0]
        at = own.argmax()
        assert first["value"] == pytest.approx(own[at])
        place = {name: getattr(places, name)[at] for name in ("example", "tile", "row", "column")}
        assert {name: first[name] for name in place} == place
        assert (first["rows"], first["columns"]) == (places.row.max() + 1, places.column.max() + 1)
        assert len({token["example"] for token in entry["top"]}) == len(entry["top"])
        assert all((whole / token["image"]).exists() for token in entry["top"])
    assert [e["energy"] for e in results["strongest"]] == sorted(
        (float(e["energy"]) for e in results["strongest"]), reverse=True
    )


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_bytes(study, whole, tmp_path):
    """Killed before each of its steps, and within its training."""
    moments = [(3, dictionaries), (1, dictionaries), (2, Workdir), (5, Workdir)]
    for calls, place in moments:
        with in_process.killed_after(calls, place):
            study(tmp_path / "killed")

    def differs(name):
        return name.name == stamps.NAME or name.parts[0] == "checkpoints"

    in_process.assert_same_files(whole, study(tmp_path / "killed"), apart_from=differs)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokens": "all"}, "config.tokens: 'all' is not one of image, text"),
        (
            {"site": "vision.resid_post"},
            "config.site=vision.resid_post: this study reads a site of",
        ),
        ({"site": "lm.resid_post.latents"}, "config.site=lm.resid_post.latents: this study reads"),
        ({"shown": 0}, "config.shown=0 is not a whole number from 1"),
        ({"recipe.kind": "gated"}, "kind='gated' is not one of topk, batch_topk, jumprelu"),
        ({"recipe.k": 999}, "k=999 is not a whole number from 1 to 256"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_read(fields, says, config_of):
    config = config_of("configs/embedded_dictionary.py:quick", model="nowhere", **fields)
    with pytest.raises(ValueError, match=says):
        dictionary.run(config, None)
