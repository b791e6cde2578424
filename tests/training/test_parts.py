"""What trains is what was said, in as little memory as was said; all else stays bit for bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.families.llava import model as llava
from mllm_jax.planning import programs
from mllm_jax.training import fit, losses, parts

LORA = parts.Lora(rank=3, alpha=6, matrices=r"lm\.layers\.(attn\.[qv]|mlp\.down)\.kernel")
ADAPTED = {f"lm.layers.{name}.kernel" for name in ("attn.q", "attn.v", "mlp.down")}
LAYERS, NEURONS, WIDTH = 2, 48, 32


@pytest.fixture(scope="module")
def masks():
    rng = np.random.default_rng(0)
    return {"up": rng.random((LAYERS, NEURONS)) < 0.2, "down": rng.random((LAYERS, NEURONS)) < 0.3}


def weights(model) -> dict[str, np.ndarray]:
    trained = parts.partition(model, "projector+lm")
    every = trained.trained["projector"] | trained.trained["lm"] | trained.frozen["weights"]
    return {name: np.asarray(array) for name, array in every.items()}


@jax.jit
def nll(model, batch):
    return losses.answer_nll(model, batch)[0]


@pytest.mark.parametrize("part", ["projector", "lm", "projector+lm", "projector+lora", "neurons"])
def test_all_else_is_frozen_bit_for_bit(part, model, batches, masks):
    recipe = fit.Recipe(part=part, lora=LORA, rate=0.05, projector_rate=0.02, warmup=0)
    neurons = masks if part == "neurons" else None
    after, _ = fit.fit(model, batches[:3], recipe, neurons=neurons)
    before, after = weights(model), weights(after)
    assert before.keys() == after.keys()
    chosen = part.split("+")
    for name, array in before.items():
        moved = array != after[name]
        trains = name.split(".")[0] in chosen or ("lora" in chosen and name in ADAPTED)
        if part == "neurons" and name in ("lm.layers.mlp.up.kernel", "lm.layers.mlp.down.kernel"):
            side = name.split(".")[3]
            apart = moved if side == "down" else moved.swapaxes(1, 2)  # [L, F, D]
            np.testing.assert_array_equal(apart.any(-1), masks[side])
        else:
            assert moved.any() == trains, name
    assert weights(model)["lm.embed"].tobytes() == before["lm.embed"].tobytes()  # not given away


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def optimiser_bytes(trained) -> int:
    return nbytes(jax.eval_shape(fit.Recipe().optimiser(100).init, trained))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_of_the_optimiser_at_real_size(dtype):
    """The embedded model and LLaVA-1.5-7B, by shape alone: 3 x 4 bytes a trained number."""
    for config in (llava.LlavaConfig.embedded(), llava.LlavaConfig.llava_1_5_7b()):
        model = programs.abstract_model(config, dtype)
        trained = parts.partition(model, "projector").trained
        projector = 4 * parts.size(model.projector)
        assert nbytes(trained) == projector
        assert 2 * projector <= optimiser_bytes(trained) <= 2 * projector + 2**20


def test_memory_of_changes_is_theirs_alone(model, masks):
    trained = parts.partition(model, "projector+lora", lora=LORA).trained
    numbers = LAYERS * LORA.rank * ((32 + 32) + (32 + 16) + (48 + 32))  # of q, v and down
    assert parts.size(trained["lora"]) == numbers
    assert optimiser_bytes(trained) - 2 * nbytes(trained) < 64
    trained = parts.partition(model, "neurons", neurons=masks).trained
    assert parts.size(trained) == WIDTH * sum(mask.sum() for mask in masks.values())
    assert optimiser_bytes(trained) - 2 * nbytes(trained) < 64


def test_a_new_low_rank_change_changes_nothing(model, batches):
    merge, trained, frozen = parts.partition(model, "lora", lora=LORA, seed=1)
    before, after = weights(model), weights(merge(trained, frozen))
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    for batch in batches[:2]:
        batch = batch.replace(processor=None)
        want, got = nll(model, batch), nll(merge(trained, frozen), batch)
        assert np.asarray(want).tobytes() == np.asarray(got).tobytes()
    other = parts.partition(model, "lora", lora=LORA, seed=2).trained["lora"]
    assert all((other[name]["a"] != trained["lora"][name]["a"]).all() for name in ADAPTED)


def test_merged_is_unmerged(model):
    """x (W + s A B) = x W + s (x A) B, in every layer."""
    merge, trained, frozen = parts.partition(model, "lora", lora=LORA)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), trained)
    before, after = weights(model), weights(merge(trained, frozen))
    for name in ADAPTED:
        x = rng.normal(size=(LAYERS, 5, before[name].shape[1]))
        pair = trained["lora"][name]
        want = x @ before[name] + 2 * (x @ pair["a"]) @ pair["b"]
        np.testing.assert_allclose(x @ after[name], want, rtol=0, atol=1e-5)
    for name in before.keys() - ADAPTED:
        np.testing.assert_array_equal(before[name], after[name])


def test_the_gradient_of_neurons_is_that_of_their_weights(model, batches, masks):
    """A mask on the gradient of the whole matrices, as NeFT trains, says the same."""
    batch = batches[0].replace(processor=None)

    def slope(part, **how):
        merge, trained, frozen = parts.partition(model, part, **how)
        return jax.jit(jax.grad(lambda t: losses.answer_nll(merge(t, frozen), batch)[0].sum()))(
            trained
        )

    whole, own = slope("lm")["lm"], slope("neurons", neurons=masks)["neurons"]
    up = whole["lm.layers.mlp.up.kernel"].swapaxes(1, 2)[masks["up"]]
    down = whole["lm.layers.mlp.down.kernel"][masks["down"]]
    np.testing.assert_allclose(own["up"], up, rtol=0, atol=1e-6)
    np.testing.assert_allclose(own["down"], down, rtol=0, atol=1e-6)


def test_the_projector_has_its_own_rate(model, batches):
    """AdamW's first step is the rate, whatever the gradient."""
    recipe = fit.Recipe(part="projector+lora", lora=LORA, rate=0.5, projector_rate=0.25, clip=0)
    _, trained, _ = parts.partition(model, "projector+lora", lora=LORA)
    optimiser = recipe.optimiser(1)
    gradient = jax.tree.map(jnp.ones_like, trained)
    change, _ = jax.jit(optimiser.update)(gradient, jax.jit(optimiser.init)(trained), trained)
    for part, rate in (("projector", 0.25), ("lora", 0.5)):
        for leaf in jax.tree.leaves(change[part]):
            np.testing.assert_allclose(leaf, -rate, rtol=1e-4)


@pytest.mark.parametrize(
    ("part", "projector_rate"),
    [("projector+lm", None), ("projector+lora", 0.25), ("neurons", None)],
)
def test_weight_decay_is_of_matrices(part, projector_rate, model, masks):
    """Without a gradient the decay is all that changes: not biases, nor the scales of norms."""
    neurons = masks if part == "neurons" else None
    _, trained, _ = parts.partition(model, part, lora=LORA, neurons=neurons)
    recipe = fit.Recipe(part=part, rate=0.5, projector_rate=projector_rate, weight_decay=0.1)
    optimiser = recipe.optimiser(1)
    nothing = jax.tree.map(jnp.zeros_like, trained)
    change, _ = jax.jit(optimiser.update)(nothing, jax.jit(optimiser.init)(trained), trained)
    assert change.keys() == trained.keys()
    for module, arrays in trained.items():
        rate = 0.1 * (projector_rate if projector_rate and module == "projector" else 0.5)
        for path, array in jax.tree_util.tree_leaves_with_path(arrays):
            name = jax.tree_util.keystr(path)
            want = 0 if ".bias" in name or ".scale" in name else -rate
            got = functools.reduce(lambda tree, key: tree[key.key], path, change[module])
            np.testing.assert_allclose(got, want * array, rtol=1e-5, atol=1e-8, err_msg=name)
    names = {name for module in ("projector", "lm") for name in trained.get(module, ())}
    assert part != "projector+lm" or {"lm.embed", "projector.linears.0.bias"} < names


@pytest.mark.parametrize(
    ("part", "how", "says"),
    [
        ("vison", {}, 'part="vison": vison is not one of projector, lm, lora, neurons'),
        ("lm+lora", {}, "trains weights of the LM twice"),
        ("neurons", {}, 'part="neurons" needs neurons='),
        ("lm", {"neurons": {}}, 'part="lm" takes no neurons='),
        ("lora+neurons", {"neurons": {"up": np.ones((2, 48), bool)}},
         r"trains lm.layers.mlp.up.kernel twice: leave the matrices of neurons= out"),
        ("lora", {"lora": parts.Lora(matrices="lm.head")}, "no weight is named lm.head; known are"),
        ("neurons", {"neurons": {"uq": None}}, "neurons of 'uq': the matrices of an MLP are gate, up and down"),
        ("neurons", {"neurons": {"up": np.zeros((2, 48), bool)}},
         r"neurons of up: expected bool\[2, 48\] with some of them True, got bool\[2, 48\] with 0"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_said(part, how, says, model):
    with pytest.raises(ValueError, match=says):
        parts.partition(model, part, **how)
