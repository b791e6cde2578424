"""The lens study on a tiny model: its numbers are those of the lenses, token by token."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mllm_jax as mj
from experiments.lens import study as lens
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import domains
from mllm_jax.training import lenses
from tests.helpers import in_process, tiny

SMALL = {
    "model": "tiny", "layers": (1, 2, 3), "word_layers": (2,), "train_per_domain": 6,
    "test_per_domain": 3, "jacobian_per_domain": 2, "steps": 4, "tokens": 8, "batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two domains of noise, whose questions the tiny tokenizer knows."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for name, answer in (("first", "cat"), ("second", "dog")):
        rows = []
        for i in range(40):
            tiny.picture(i + 100 * len(paths)).save(folder / f"{name}{i}.png")
            question = {"question": "what is shown ?", "options": ("cat", "dog")}
            rows.append({"image": f"{name}{i}.png", "answer": answer, "style": "category"})
            rows[-1] |= question
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    return tuple(map(str, paths))


@pytest.fixture(scope="module")
def study(config_of, tiny_config, tiny_model, pictures):
    """Runs the study of the tiny model in this process; its workdir."""

    def run(folder):
        config = config_of("configs/embedded_lens.py:quick", paths=pictures, **SMALL)
        loaded = tiny_model, tiny.processor(tiny_config)
        return in_process.run(lens, config, folder, loaded)

    return run


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    return study(tmp_path_factory.mktemp("lens") / "work")


def only(rows, **fields):
    (row,) = [row for row in rows if all(row[key] == value for key, value in fields.items())]
    return row


@pytest.mark.slow
def test_curves_are_means_over_the_tokens_of_test_pictures(
    finished, tiny_config, tiny_model, pictures
):
    results = json.loads((finished / "results.json").read_text())
    assert results["lenses"] == ["logit", "tuned", "jacobian"]
    assert results["pictures"] == {"first": 3, "second": 3} and results["jacobian_pictures"] == 4
    processor, found = tiny.processor(tiny_config), {}
    for name, domain in domains.load_user_domains(list(pictures), "test").items():
        for example in list(domain)[:3]:
            batch = processor([example.image], ["what is shown ?"])
            kept = {"x": mj.keep(S.lm.resid_post[[1, 2, 3]])}
            x = np.asarray(mj.run(tiny_model, batch, None, kept)["x"])[:, 0].swapaxes(0, 1)
            for kind, where in (("image", tok.image), ("question", tok.question)):
                mask = np.asarray(where.mask(batch.tokens))[0]
                found.setdefault((name, kind), []).extend(x[mask])
    for fitted in results["lenses"]:
        maps = None
        if fitted != "logit":
            with np.load(finished / f"lens-{fitted}.npz") as file:
                maps = lenses.AffineLens(file["weight"], file["bias"])
        for (name, kind), states in found.items():
            want = lenses.compare(tiny_model, np.stack(states), maps)
            for measure in ("kl", "entropy", "agrees"):
                for i, layer in enumerate((1, 2, 3)):
                    fields = {"lens": fitted, "domain": name, "kind": kind, "measure": measure}
                    row = only(results["curves"], layer=layer, **fields)
                    np.testing.assert_allclose(
                        row["value"], getattr(want, measure)[i].mean(), atol=1e-4
                    )
                    assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9
    for row in results["curves"]:
        if row["layer"] == 3 and row["measure"] in ("kl", "agrees"):
            assert abs(row["value"] - (row["measure"] == "agrees")) < 1e-4


@pytest.mark.slow
def test_nearest_words_are_those_of_a_loop(finished, tiny_config, tiny_model, pictures):
    """The states of two texts at three layers, and every image token of every test picture."""
    results = json.loads((finished / "results.json").read_text())
    assert results["texts"] == ["cat", "dog"]
    processor = tiny.processor(tiny_config)
    kept = {"x": mj.keep(S.lm.resid_post[[1, 2, 3]])}
    bank = []
    for of, text in (("first", "cat"), ("second", "dog")):
        batch = processor(None, [text])
        x = np.asarray(mj.run(tiny_model, batch, None, kept)["x"], np.float64)[:, 0]
        for token in np.flatnonzero(tok.question.mask(batch.tokens)[0]):
            word = processor.word(int(batch.ids[0, token]))
            bank += [(of, word, layer, x[i, token]) for i, layer in enumerate((1, 2, 3))]
    vectors = np.stack([vector / np.linalg.norm(vector) for *_, vector in bank])
    for name, domain in domains.load_user_domains(list(pictures), "test").items():
        own = {layer: [] for layer in (1, 2, 3)}
        for example in list(domain)[:3]:
            batch = processor([example.image], ["what is shown ?"])
            x = np.asarray(mj.run(tiny_model, batch, None, kept)["x"], np.float64)[:, 0]
            for i, layer in enumerate(own):
                for state in x[i, np.asarray(tok.image.mask(batch.tokens))[0]]:
                    near = vectors @ state
                    own[layer].append(
                        (bank[near.argmax()][0] == name, near.max() / np.linalg.norm(state))
                    )
        for layer, found in own.items():
            row = only(results["nearest"], domain=name, layer=layer)
            assert row["value"] == pytest.approx(np.mean([is_own for is_own, _ in found]))
            assert row["cosine"] == pytest.approx(
                np.mean([cosine for _, cosine in found]), abs=1e-5
            )
            assert row["chance"] == pytest.approx(np.mean([of == name for of, *_ in bank]))
            assert sum(share for _, share in row["words"]) <= 1 + 1e-9 and row["pictures"] == 3


@pytest.mark.slow
def test_leaves_a_page_figures_tables_and_words(finished):
    for name in ("index.html", "manifest.json", "figures/kl.png", "figures/entropy.png",
                 "figures/agrees.png", "figures/domains.png", "figures/words-1.png",
                 "figures/loss.png", "tables/curves.csv", "tables/beyond_logit.csv",
                 "figures/nearest.png", "tables/nearest.csv"):  # fmt: skip
        assert (finished / name).stat().st_size > 100
    (first, _) = json.loads((finished / "results.json").read_text())["words"]
    assert [panel["title"] for panel in first["panels"]] == [
        f"{name} lens, layer 2" for name in ("logit", "tuned", "jacobian")
    ]
    assert np.shape(first["panels"][0]["words"]) == np.shape(first["panels"][0]["entropy"])


@pytest.mark.slow
def test_killed_in_several_steps_it_ends_with_the_same_bytes(study, finished, tmp_path):
    for steps in (2, 8, 6, 12):  # in the states, the Jacobians and what is measured
        with in_process.killed_after(steps):
            study(tmp_path / "killed")
    in_process.assert_same_files(finished, study(tmp_path / "killed"))


def test_rows_are_sums_over_tokens_and_differences_are_of_the_same_tokens():
    rng = np.random.default_rng(0)
    tokens = np.array([[4, 2], [3, 1], [5, 0]])
    measured = {
        name: {"tokens": tokens} | {
            key: rng.normal(size=(3, 2, 2)) * (tokens > 0)[:, None] for key in lens.MEASURES
        }
        for name in ("logit", "tuned")
    }  # fmt: skip
    rows = lens.curves(measured, ["a", "b", "b"], [7, 9])
    for domain, chosen in (("all", [0, 1, 2]), ("a", [0]), ("b", [1, 2])):
        for k, kind in enumerate(("image", "question")):
            fields = {"lens": "tuned", "measure": "kl", "kind": kind, "layer": 9}
            row = only(rows, domain=domain, **fields)
            want = sum(measured["tuned"]["kl"][n, 1, k] for n in chosen)
            assert row["value"] == pytest.approx(want / sum(tokens[n, k] for n in chosen))
            assert row["pictures"] == sum(tokens[n, k] > 0 for n in chosen)
    row = only(lens.beyond(measured, [7, 9]), lens="tuned", measure="agrees", kind="image", layer=7)
    difference = measured["tuned"]["agrees"] - measured["logit"]["agrees"]
    assert row["value"] == pytest.approx(difference[:, 0, 0].sum() / 12)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": (1, 2)}, r"config.layers=\(1, 2\): give two or more .* model's last, 3"),
        ({"layers": (2, 1, 3)}, "in increasing order"),
        ({"layers": (3,)}, "give two or more"),
        ({"layers": (1, 3), "word_layers": (2,)}, "config.word_layers: 2 is not among"),
    ],
)
def test_layers_that_no_lens_can_have_are_refused(fields, says, config_of):
    config = config_of("configs/embedded_lens.py:quick", **({"word_layers": ()} | fields))
    with pytest.raises(ValueError, match=says):
        lens._layers(config, 4)
    every = config_of("configs/embedded_lens.py:quick", layers=(), word_layers=(0,))
    assert lens._layers(every, 4) == [0, 1, 2, 3]
