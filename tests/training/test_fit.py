"""Only the chosen part trains; a killed run ends with the same bytes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax.interventions.tap import Taps
from mllm_jax.training import fit, losses, parts
from tests.helpers import lesson

RECIPE = fit.Recipe(rate=0.1, warmup=0.1, every=3)


def arrays(model) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@jax.jit
def nll(model, batch):
    return losses.answer_nll(model, batch)


def mean_nll(model, batch) -> float:
    total, count = nll(model, batch.replace(processor=None))
    return total.sum() / count.sum()


@pytest.fixture(scope="module")
def trained(model, batches):
    return fit.fit(model, batches, RECIPE)


def test_the_loss_falls_and_the_rest_is_frozen(model, batches, trained):
    after, curve = trained
    assert curve.dtype == np.float32 and curve.shape == (len(batches),)
    assert np.isfinite(curve).all() and curve[-2:].mean() < curve[:2].mean() - 0.2
    np.testing.assert_allclose(curve[0], mean_nll(model, batches[0]), rtol=1e-5)
    assert mean_nll(after, batches[0]) < curve[-2]
    before, after = arrays(model), arrays(after)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert np.array_equal(array, after[name]) == ("projector" not in name), name


class Killed(BaseException):
    pass


class Until(list):
    """Batches that are there until the run is killed."""

    stop = 10**9

    def __getitem__(self, step):
        if step == self.stop:
            raise Killed
        return super().__getitem__(step)


def distance(model, batch, *, remat):
    """A loss that is quickly compiled: how far each row's image tokens are from 1.

    The weights that are adapted cost as well.
    """
    tap, low = Taps().module("projector"), model.lm.layers.attn.q.kernel[...]
    apart = (model.projector(batch.features, tap) - 1) ** 2
    return apart.mean((1, 2)) + (low**2).mean(), jnp.ones(len(apart))


@pytest.mark.parametrize(
    "part", ["projector", pytest.param("projector+lora", marks=pytest.mark.slow)]
)
def test_killed_and_restarted_it_ends_with_the_same_bytes(part, model, batches, tmp_path):
    """After seven steps, of which one is lost; what is done is made again, and not trained."""
    recipe = dataclasses.replace(RECIPE, part=part, projector_rate=0.05)
    want, whole = fit.fit(model, batches, recipe, loss=distance)
    killed = Until(batches)
    killed.stop = 7
    with pytest.raises(Killed):
        fit.fit(model, killed, recipe, loss=distance, save=tmp_path)
    for _ in range(2):
        got, curve = fit.fit(model, batches, recipe, loss=distance, save=tmp_path)
        np.testing.assert_array_equal(curve, whole)
        for (name, a), b in zip(arrays(got).items(), arrays(want).values(), strict=True):
            assert a.tobytes() == b.tobytes(), name


def far(model, batch, *, remat):
    """As `distance`, from elsewhere."""
    sums, counts = distance(model, batch, remat=remat)
    return sums + 1, counts


def test_another_training_is_refused(model, batches, tmp_path, monkeypatch):
    recipe, some = dataclasses.replace(RECIPE, every=1), batches[:2]
    want, curve = fit.fit(model, some, recipe, loss=distance, save=tmp_path)
    other = nnx.clone(model)
    other.projector.linears[0].kernel[...] *= 2
    monkeypatch.setattr(fit, "_update", None)  # no step is done
    for start, data, changes, loss, differs in (
        (model, some, {"rate": 0.2}, distance, r"settings \(rate\)"),
        (model, batches[:3], {}, distance, r"settings \(steps\)"),
        (
            model,
            some,
            {"part": "projector+lora", "clip": 0.0},
            distance,
            r"settings \(clip, part\)",
        ),
        (model, some[::-1], {}, distance, r"data \(what the first 2 were\)"),
        (other, some, {}, distance, "model"),
        (model, some, {}, far, r"code \(loss\)"),
    ):
        with pytest.raises(ValueError, match=f"made for .* it differs in {differs}; give") as said:
            changed = dataclasses.replace(recipe, **changes)
            fit.fit(start, data, changed, loss=loss, save=tmp_path)
        assert len(str(said.value)) < 400
    before = mj.compiles()
    again, same = fit.fit(model, some, recipe, loss=distance, save=tmp_path)
    assert mj.compiles() == before
    np.testing.assert_array_equal(same, curve)
    for (name, a), b in zip(arrays(again).items(), arrays(want).values(), strict=True):
        assert a.tobytes() == b.tobytes(), name


def test_a_loss_that_is_not_a_number(model, batches, tmp_path):
    def loss(model, batch, *, remat):
        kernel = model.projector.linears[0].kernel[...]
        return jnp.sqrt(jnp.sum(kernel) - 1e9), jnp.ones(())

    message = r"train: the loss of step 0 is nan; lower the learning rate \(now 0.1\) or look at"
    with pytest.raises(FloatingPointError, match=message):
        fit.fit(model, batches, RECIPE, loss=loss, save=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # nothing of it is kept


def test_the_gradient_of_the_projector_is_that_of_central_differences(model, batches, monkeypatch):
    """All in float64, or differences would have no digits left."""
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        merge, trains, frozen = parts.partition(_double(model), "projector")
        batch = _double(batches[0].replace(processor=None))

        def loss(trains, remat=False):
            sums, counts = losses.answer_nll(merge(trains, frozen), batch, remat=remat)
            return sums.sum() / counts.sum()

        slope = jax.jit(jax.grad(lambda trains: loss(trains, remat=True)))(trains)
        loss = jax.jit(loss)
        rng = np.random.default_rng(0)
        for _ in range(3):
            way = jax.tree.map(lambda a: rng.normal(size=a.shape), trains)
            up, down = (
                loss(jax.tree.map(lambda a, w, s=step: a + s * w, trains, way))
                for step in (1e-6, -1e-6)
            )
            pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(way), strict=True)
            along = sum(np.vdot(a, b) for a, b in pairs)
            np.testing.assert_allclose(along, (up - down) / 2e-6, rtol=1e-6)


def _double(tree):
    def one(a):
        return a.astype(np.float64) if a.dtype == np.float32 else a

    return jax.tree.map(one, tree)


def test_right_and_wrong_pictures(model, batches):
    two = [batch.replace(processor=None) for batch in batches[:2]]
    right, wrong = fit.evaluate(model, two)
    swapped = [batch.replace(features=batch.features[::-1]) for batch in two]
    for got, some in ((right, two), (wrong, swapped)):
        found = [nll(model, batch) for batch in some]
        want = sum(n.sum() for n, _ in found) / sum(c.sum() for _, c in found)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert abs(right - wrong) > 1e-3


def test_a_step_does_not_depend_on_how_it_is_cut(model, processor, features):
    """Halves with unequal numbers of answer tokens."""
    turns = [lesson.TURNS[0][:1], *lesson.TURNS[1:]]

    def rows(*at):
        some = [turns[i] for i in at]
        return processor.pack(None, some, features=features[list(at)], length=40)

    recipe = fit.Recipe(rate=2e-3, warmup=0, clip=0.5)  # Adam makes much of what is rounded
    whole, curve = fit.fit(model, [rows(0, 1, 2, 3)] * 3, recipe)
    halved = dataclasses.replace(recipe, accumulate=2)
    parted, other = fit.fit(model, [rows(0, 1), rows(2, 3)] * 3, halved)
    assert len(other) == 3
    np.testing.assert_allclose(other, curve, rtol=1e-5)
    want, got = arrays(whole), arrays(parted)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5)
    assert curve[-1] < curve[0]
    with pytest.raises(ValueError, match="3 batches do not divide into steps of 2"):
        fit.fit(model, [rows(0, 1)] * 3, halved)


def test_a_second_run_compiles_nothing(model, batches):
    recipe = fit.Recipe(every=7)
    fit.fit(model, batches[:2], recipe, loss=distance)
    before = fit._update._cache_size()
    fit.fit(model, batches[2:4], recipe, loss=distance)
    assert fit._update._cache_size() == before
