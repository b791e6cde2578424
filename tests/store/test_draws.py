"""One path, asked for many things in turn: never the numbers of another, and the same is free."""

from __future__ import annotations

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.data import features, pooled
from mllm_jax.interventions.tap import Taps
from mllm_jax.passes import clean_pass, sweep
from mllm_jax.training import fit
from tests.helpers import tiny

reduce_ = importlib.import_module("mllm_jax.passes.reduce")
EXAMPLES = [types.SimpleNamespace(image=tiny.picture(i)) for i in range(4)]
PROMPTS = ["what is shown ?", "a cat or dog ?", "a ship ?", "?"]
DRAWS = 40  # of each of five kinds of store


def sums(model, batches, data, setting, **how):
    captures = {"x": mj.stats(S.lm.mlp.act[setting])}
    return mj.reduce(captures, model, [batches[i] for i in data], **how)["x"].sum


def rows(model, batches, data, setting, **how):
    edits = [mj.ablate(S.lm.mlp.act[i]) for i in data]
    metric = (lambda out: out.logits[:, 3]), (lambda out: out.logits[:, 4])
    return mj.sweep(metric[setting], model, batches[0], edits, chunk=2, **how)


def dark(pictures, return_tensors):
    return {"pixel_values": tiny.shrink(pictures, 24)["pixel_values"] / 2}


def seen(model, batches, data, setting, save, **how):
    processor = tiny.processor(model.config)
    if setting:
        processor._make_image_processor = lambda: dark
    some = [EXAMPLES[i] for i in data]
    return features.vision_features(model, processor, some, save / "x.npy", batch_size=2, **how)


def means(model, batches, data, setting, save, **how):
    processor = tiny.processor(model.config)
    prompts = [PROMPTS[(i + setting) % 4] for i in data]
    some = [EXAMPLES[i] for i in data]
    found = pooled.pooled_features(
        model, processor, some, prompts, save, batch_size=2, length=32, **how
    )
    return found["lm.last"]


def apart(model, batch, *, remat):
    """Quickly compiled: how far image tokens are from 1."""
    out = model.projector(model.features(batch, Taps()), Taps().module("projector"))
    return ((out - 1) ** 2).mean((1, 2)), jnp.ones(len(out))


def trained(model, batches, data, setting, **how):
    recipe = fit.Recipe(rate=(0.1, 0.2)[setting], warmup=0.5, every=1)
    after, curve = fit.fit(model, [batches[i] for i in data], recipe, loss=apart, **how)
    return np.concatenate([curve, np.ravel(after.projector.linears[0].kernel[...])])


KINDS = {
    "reduce": (sums, lambda p: p / "x.npz", [(reduce_, "run")]),
    "sweep": (
        rows,
        lambda p: p / "x.npz",
        [(clean_pass, "compute_clean_pass"), (sweep._Rows, "write")],
    ),
    "features": (seen, lambda p: p, [(features, "encode_pictures")]),
    "pooled": (means, lambda p: p, [(pooled, "_pooled")]),
    "fit": (trained, lambda p: p, [(fit, "_update")]),
}


@pytest.fixture(scope="module")
def models(tiny_model):
    """Three, which differ in one weight of the tower, and in one of the projector."""

    def changed(name):
        def one(path, leaf):
            found = np.array(leaf)
            if name in jax.tree_util.keystr(path) and found.ndim == 2:
                found[0, 0] += 0.5
            return jnp.asarray(found)

        return jax.tree_util.tree_map_with_path(one, tiny_model)

    return [tiny_model, changed("vision"), changed("projector")]


@pytest.fixture(scope="module")
def batches(make_batch):
    return [make_batch(images=(4, 3), words=(9, 6), seed=seed) for seed in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_never_the_numbers_of_another(kind, models, batches, tmp_path):
    work, place, compute = KINDS[kind]
    rng = np.random.default_rng(list(kind.encode()))
    wanted, owner, counts = {}, None, {"same": 0, "more": 0, "refused": 0, "restart": 0}
    save = place(tmp_path / "shared")

    def draw():
        data = tuple(rng.integers(0, 4, rng.integers(1, 4)).tolist())
        return int(rng.integers(3)), data, int(rng.integers(2))

    def run(asked, save, **how):
        model, data, setting = asked
        return np.array(work(models[model], batches, data, setting, save=save, **how))

    for number in range(DRAWS):
        asked, choice = draw(), rng.random()
        if owner is not None and choice < 0.25:
            asked = owner
        elif owner is not None and choice < 0.4:
            asked = (owner[0], owner[1] + (int(rng.integers(4)),), owner[2])
        if asked not in wanted:
            wanted[asked] = run(asked, place(tmp_path / str(number)))
        same = asked == owner
        more = owner is not None and kind != "fit" and (
            asked[::2] == owner[::2] and asked[1][: len(owner[1])] == owner[1]
        )  # fmt: skip
        fresh = kind == "features" and owner is not None and alike(models, asked, owner)
        if same or more or owner is None or fresh:
            with pytest.MonkeyPatch.context() as patch:
                for module, name in compute if same else ():
                    patch.setattr(module, name, None)  # nothing is computed again
                before = mj.compiles()
                found = run(asked, save)
                assert not same or mj.compiles() == before
            counts["same" if same else "more"] += 1
        else:
            with pytest.raises(ValueError, match="made for something else|only .* requested") as e:
                run(asked, save)
            assert len(str(e.value)) < 400 and "\n" not in str(e.value)
            counts["refused"] += 1
            if rng.random() < 0.5:
                continue
            found = run(asked, save, restart=True)
            counts["restart"] += 1
        owner = asked
        np.testing.assert_allclose(found, wanted[asked], rtol=0, atol=1e-5)
    assert counts["same"] > 3 and counts["refused"] > 10 and counts["restart"] > 3


def alike(models, asked, owner) -> bool:
    """Whether features of two requests are the same ones: those of one tower, or of more pictures."""
    towers = [0, 1, 0]
    return (
        towers[asked[0]] == towers[owner[0]] and asked[2] == owner[2]
        and asked[1][: len(owner[1])] == owner[1]
    )  # fmt: skip
