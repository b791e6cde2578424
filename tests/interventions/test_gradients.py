"""Gradients through every edit are central differences of the whole program in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from tests.helpers import oracle

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.fixture(scope="module")
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def wide(tiny_model, in_float64):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tiny_model)


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(images=(1, 1), words=(6, 5))


def assert_slopes(metric, at, *fixed):
    """The gradient of metric(at, *fixed), in random directions of each entry of the dict `at`."""
    rng, step = np.random.default_rng(0), 1e-5
    slope = jax.jit(jax.grad(metric))(at, *fixed)
    metric = jax.jit(metric)
    for name, value in at.items():
        assert slope[name].dtype == np.float64 and np.isfinite(slope[name]).all()
        for _ in range(3):
            way = rng.normal(size=np.shape(value))
            ahead, behind = (metric(at | {name: value + s * way}, *fixed) for s in (step, -step))
            difference = (ahead - behind) / (2 * step)
            assert abs(difference) > 1e-3, name  # or it would show nothing
            got = (slope[name] * way).sum()
            np.testing.assert_allclose(got, difference, rtol=1e-6, err_msg=name)


def loss(out):
    """Every logit counts, and differently."""
    return jnp.sum(out.logits[0] ** 2) + jnp.sum(jnp.sin(out.logits[1]))


def test_a_model_in_float64_stays_in_float64(wide, batch):
    asked = {site.name: mj.keep(site) for site in oracle.SITES if site not in S.MASKS}
    asked |= {
        "mean": mj.mean(S.lm.mlp.act),
        "mass": mj.mass(S.lm.attn.pattern, on=tok.image),
        "stats": mj.stats(S.lm.mlp.act, by=tok.kind),
        "lens": mj.lens(S.lm.resid_post[1], k=2),
        "entropy": mj.lens(S.lm.resid_post, by=tok.kind),
    }
    edits = mj.project_out(S.lm.resid_post[1], np.ones(32, np.float32))

    def run(model):
        return mj.run(model, batch, edits, asked)

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(run, wide)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == np.float64, jax.tree_util.keystr(path)


GATED = {
    "lm.mlp.act": (4, 48), "lm.attn.heads": (4, 4), "vision.mlp.act": (2, 64),
    "projector.act": (1, 32),
}  # fmt: skip


def test_of_gates(wide, batch):
    """At a clean pass, and away from it, where what the receipts say has a slope as well."""

    def metric(gates, reports):
        edits = [mj.scale(S.get(name), gate) for name, gate in gates.items()]
        out = mj.run(wide, batch, edits[0] >> edits[1] >> edits[2] >> edits[3])
        return loss(out) + reports * sum(jnp.sum(receipt.norm) for receipt in out.receipts)

    rng = np.random.default_rng(1)
    assert_slopes(metric, {name: np.ones(shape) for name, shape in GATED.items()}, 0.0)
    away = {name: rng.uniform(0.5, 1.5, shape) for name, shape in GATED.items()}
    assert_slopes(metric, away, 1.0)


def test_through_every_kind_of_edit(wide, batch):
    def metric(at):
        edits = (
            mj.scale(S.lm.mlp.act, at["gates"])
            >> mj.patch(S.lm.resid_post[0], 0, 1, where=tok.last)
            >> mj.patch(S.lm.resid_mid[1], [1, 0], [0, 1], where=tok.image, basis=at["swapped"])
            >> mj.knockout(S.lm.attn[1], to=tok.last, on=tok.image)
            >> mj.knockout(S.lm.attn[3, [0]], to=tok.last, on=tok.every)  # it sees nothing at all
            >> mj.project_out(S.lm.resid_post[1], at["gone"])
            >> mj.replace(S.lm.mlp.out[2], at["mean"], where=tok.image)
            >> mj.call(S.lm.attn.heads[2], lambda x, a: jnp.sin(a * x), a=at["wave"])
            >> mj.per_step(mj.add(S.lm.resid_post[2], at["steer"]), at["strengths"])
            >> mj.ablate(S.lm.mlp.gated[3, :10])
        )
        return loss(mj.run(wide, batch, edits))

    rng = np.random.default_rng(2)
    shapes = {
        "gates": (4, 48), "swapped": (32, 3), "gone": (32,), "mean": (32,), "wave": (4,),
        "steer": (32,), "strengths": (2,),
    }  # fmt: skip
    assert_slopes(metric, {name: rng.normal(size=shape) for name, shape in shapes.items()})


def test_of_scores(wide, batch):
    """What `score` gives, over the cached prompt and its candidates."""
    ids = np.array([[[3, 5, -1], [7, 1, 2]], [[4, -1, -1], [9, 8, 7]]], np.int32)

    def metric(at):
        edits = mj.scale(S.lm.mlp.act, at["gates"]) >> mj.scale(S.projector.act, at["pictures"])
        scores = mj.score(wide, batch, ids, edits)
        return jnp.sum(scores * np.array([[1.0, -1.0], [0.5, 2.0]]))

    assert_slopes(metric, {"gates": np.ones((4, 48)), "pictures": np.ones((1, 32))})
