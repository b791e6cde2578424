"""--edits and --captures mean in every binary what they mean in Python."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mllm_jax as mj
from experiments.domain_neurons import study as domain_neurons
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import batching, domains
from mllm_jax.interventions import spec
from mllm_jax.store import Workdir
from tests.helpers.studies import EVALUATE

TEXT = "ablate lm.mlp.act[3,@neurons.json] >> add lm.resid_post[1:] @v.npy*4 where=text"
ASKED = "fire=stats lm.mlp.act by=kind; last=keep lm.resid_post[-1]; tiles=mean vision.resid_post"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    np.save(folder / "v.npy", np.linspace(-1, 1, 32))
    (folder / "neurons.json").write_text("[3, 1, 4]")
    return folder


def flags(files) -> tuple[str, str]:
    edits = TEXT.replace("@", f"@{files}/")
    return f"--edits={edits}", f"--captures={ASKED}"


SMALL = ("--config.test_per_domain=3", "--config.batch_size=2", "--config.styles=('choice',)")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, command, execute, files):
    workdir = tmp_path_factory.mktemp("evaluate") / "work"
    line = command("evaluate", EVALUATE, workdir, *SMALL, *flags(files), count=2)
    done = execute(line)
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


def test_they_are_kept_with_the_results(evaluated, files):
    config = json.loads((evaluated / "manifest.json").read_text())["config"]
    for name, parse in {"edits": spec.parse, "captures": spec.parse_captures}.items():
        text = flags(files)[name == "captures"].split("=", 1)[1]
        kept = config[name]
        assert kept["text"] == text and kept["digest"] == spec.digest(parse(text))
        assert spec.digest(spec.from_json(kept["json"])) == kept["digest"]
        results = json.loads((evaluated / "results.json").read_text())
        assert results[name] == {"text": text, "digest": kept["digest"]}


def test_captures_are_those_of_the_edited_prompts(evaluated, files, checkpoint, folders):
    model, processor = mj.load(checkpoint)
    domain = domains.load_user_domains([str(f) for f in folders[:2]], "test")["greens"]
    pairs = batching.ask(list(domain)[:3], ("choice",))
    length = batching.row_length(processor, pairs)
    batch = batching.QuestionBatches(processor, pairs, 3, length)[0]  # at one time
    edits = mj.ablate(S.lm.mlp.act[3, [3, 1, 4]]) >> mj.add(
        S.lm.resid_post[1:], 4 * np.linspace(-1, 1, 32), where=tok.text
    )
    asked = {
        "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
        "last": mj.keep(S.lm.resid_post[-1]),
        "tiles": mj.mean(S.vision.resid_post),
    }
    want = mj.run(model, batch, edits, asked)
    with np.load(evaluated / "captures" / "greens-choice.npz") as found:
        assert found["fire/kinds"].tolist() == list(want["fire"].kinds)
        np.testing.assert_array_equal(found["fire/tokens"], want["fire"].tokens)
        for key, value in {"last": want["last"], "tiles": want["tiles"],
                           "fire/sum": want["fire"].sum}.items():  # fmt: skip
            assert found[key].shape == value.shape
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4)
        assert not found["fire/positive"][3, [3, 1, 4]].any()


def test_a_workdir_belongs_to_its_edits(evaluated, command, execute):
    done = execute(command("evaluate", EVALUATE, evaluated, *SMALL, count=2))
    assert done.returncode == 1
    assert "differs in captures, edits" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("study", "config", "flag", "says"),
    [
        ("train", "configs/embedded_projector.py", "--edits=ablate lm.mlp.act",
         "error: this study does not support --edits; remove the flag"),
        ("evaluate", EVALUATE, "--edits=ablate lm.mlp.akt", "unknown site 'lm.mlp.akt'; nearest"),
        ("evaluate", EVALUATE, "--captures=keep lm.embed", "a capture begins with its name"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(
    study, config, flag, says, command, execute, tmp_path
):
    done = execute(command(study, config, tmp_path / "work", flag))
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_the_main_study_is_of_the_edited_model(config_of, checkpoint, folders, tmp_path):
    """Neurons that are off are never counted, nor captured; the page says what was edited."""
    config = config_of(
        "configs/embedded.py:quick", model=str(checkpoint), paths=tuple(map(str, folders[:2])),
        train_per_domain=2, test_per_domain=2, lens_per_domain=2, controls=0, random_controls=0, entropy_controls=0, batch_size=2,
        modules=("lm",), styles=("choice",),
    )  # fmt: skip
    edits = spec.parse("ablate vision.mlp.act[0] >> ablate lm.mlp.act[2]")
    captures = spec.parse_captures("fire=stats lm.mlp.act; say=lens lm.resid_post by=image")
    kept = {"edits": {"text": "no neurons", "digest": spec.digest(edits)}}
    workdir = Workdir(tmp_path / "work", config.to_dict() | kept)
    domain_neurons.run(config, workdir, edits, captures)
    with np.load(workdir / "steps" / "counts" / "neutral" / "reds-0.npz") as counts:
        for module, off in (("vision", 0), ("lm", 2)):
            fired = counts[f"{module}/positive"].any((1, 2))
            assert not fired[off] and np.delete(fired, off).all()
    with np.load(workdir / "captures" / "reds.npz") as found:
        assert found["fire/positive"].shape == (9, 48) and not found["fire/positive"][2].any()
        assert found["say/sum"].shape == (9, 1)
    assert json.loads((workdir / "results.json").read_text())["edits"] == kept["edits"]
    assert "no neurons" in (workdir / "index.html").read_text()
