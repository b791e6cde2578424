"""A half-done workdir goes on for the same alone: everything else is refused by name."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import mllm_jax as mj
from experiments.running import agreement
from mllm_jax.loading import save
from mllm_jax.store import Workdir
from tests.helpers.studies import LABELS, STUDIES

slow = pytest.mark.slow
EVERY = [name if name == "evaluate" else pytest.param(name, marks=slow) for name in STUDIES]


class Killed(BaseException):
    pass


@pytest.fixture
def place(checkpoint, folders, tmp_path):
    """A checkpoint and two domains that a test may change; labels begin with different letters."""
    shutil.copytree(checkpoint, tmp_path / "model")
    for folder in folders[:2]:
        for label in LABELS:
            shutil.copytree(folder / label, tmp_path / folder.name / label.removeprefix("a "))
    return tmp_path


@pytest.fixture
def start(config_of, place, monkeypatch):
    """Starts a study and kills it after some of its steps."""

    def run(name: str, *, steps: int = 1, restart: bool = False, ends=Killed, **more):
        file, fields = STUDIES[name]
        paths = tuple(str(place / domain) for domain in ("reds", "greens"))
        config = config_of(file, model=str(place / "model"), paths=paths, **fields | more)
        workdir = Workdir(place / "work", config.to_dict(), restart=restart)
        whole, done = Workdir._step, []

        def step(*args):
            if len(done) == steps:
                raise Killed
            done.append(args[1])
            return whole(*args)

        ended = pytest.raises(ends) if ends else contextlib.nullcontext()
        with monkeypatch.context() as patch, ended as said:
            patch.setattr(Workdir, "_step", step)
            importlib.import_module(f"experiments.{name}.study").run(config, workdir)
        return workdir if ends in (Killed, None) else said.value

    return run


def change_pixels(place, name="reds"):
    """Of every picture of a domain, one pixel by one step."""
    for path in sorted((place / name).rglob("*.png")):
        pixels = np.array(PIL.Image.open(path))
        pixels[0, 0, 0] ^= 1
        PIL.Image.fromarray(pixels).save(path)


def change_weights(place, key="lm_head|embed_tokens"):
    path = place / "model" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    name = next(n for n in sorted(weights) if any(k in n for k in key.split("|")))
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[-1] += 1e-3
    safetensors.numpy.save_file(weights, path, metadata={"format": "pt"})


def change_mean(place):
    path = place / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))


def change_template(place):
    path = place / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "answer:"))


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", EVERY)
def test_other_content_under_the_same_names_is_refused(name, start, place, monkeypatch):
    start(name)
    before = contents(place / "work")
    changes = {
        "model": change_weights, "data": change_pixels, "processor": change_mean,
    }  # fmt: skip
    for differs, change in changes.items():
        saved = place / "saved"
        shutil.copytree(place, saved, ignore=shutil.ignore_patterns("work", "saved"))
        change(place)
        said = str(start(name, ends=ValueError))
        assert f"work was made for something else: it differs in {differs}" in said
        assert len(said) < 400 and "--restart" in said
        for part in saved.iterdir():
            shutil.rmtree(place / part.name)
            shutil.move(part, place / part.name)
        saved.rmdir()
    with monkeypatch.context() as patch:
        made_by = agreement.made_by()
        made_by["code"]["mllm_jax"] = "other"
        patch.setattr(agreement, "made_by", lambda: made_by)
        assert "differs in code (mllm_jax)" in str(start(name, ends=ValueError))
    assert contents(place / "work") == before
    start(name)
    assert contents(place / "work").items() >= before.items()


@pytest.mark.slow
def test_another_template_is_refused(start, place):
    start("evaluate")
    change_template(place)
    assert "differs in processor" in str(start("evaluate", ends=ValueError))


def test_another_content_of_masks_is_refused(start, place):
    """Be it a file, or a folder of them."""
    (place / "given").mkdir()
    (place / "given" / "lm.pth").write_text("no masks")
    fields = {"masks": str(place / "given" / "{module}.pth"), "ends": Exception}
    start("domain_neurons", **fields)  # says what is wrong with them, and does nothing
    (place / "given" / "lm.pth").write_text("nor these")
    fields["ends"] = ValueError
    assert "differs in files (masks)" in str(start("domain_neurons", **fields))


@pytest.mark.slow
def test_another_content_of_a_projector_is_refused(start, place):
    path = place / "projector.safetensors"
    model, _ = mj.load(place / "model")
    save.write_projector(model, path)
    start("train", projector=str(path))
    weights = {name: 2 * array for name, array in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(weights, path)
    said = start("train", projector=str(path), ends=ValueError)
    assert "differs in files (projector), model; give another path" in str(said)


@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(d, marks=slow) for d in ("cut", "empty", "text"))]
)
def test_a_damaged_step_is_refused(damage, start, place):
    workdir = start("evaluate")
    (path,) = (workdir / "steps").iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle], "empty": b"", "text": b"text",
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }  # fmt: skip
    path.write_bytes(damaged[damage])
    said = str(start("evaluate", ends=ValueError))
    assert path.name in said and "is damaged" in said and "\n" not in said and len(said) < 400


def test_restart_removes_what_the_study_wrote(start, place):
    workdir = start("evaluate")
    notes = [workdir / "notes.txt", workdir / "steps" / "mine.txt", workdir / "figures" / "own.png"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the user")
    before = {p.name: p.read_bytes() for p in (workdir / "steps").glob("*.npz")}
    change_pixels(place)
    start("evaluate", restart=True)
    assert all(path.read_text() == "of the user" for path in notes)
    after = {p.name: p.read_bytes() for p in (workdir / "steps").glob("*.npz")}
    assert before.keys() == after.keys() and before != after
    start("evaluate", steps=2, ends=None)  # and goes on from there


@pytest.mark.slow
def test_the_manifest_says_of_what_it_is(start, place):
    """Of the model, of all pictures and of the code."""
    start("evaluate", ends=None, steps=10**9)
    manifest = json.loads((place / "work" / "manifest.json").read_text())
    assert manifest["model"] and set(manifest["data"]) == {"reds", "greens"}
    assert set(manifest["code"]) == {"mllm_jax", "experiments"} and manifest["processor"]
    before = (place / "work" / "results.json").read_bytes()
    start("evaluate", ends=None, steps=10**9)
    assert (place / "work" / "results.json").read_bytes() == before
