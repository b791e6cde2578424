"""What must hold on the device there is, with bounds for its kind: `make test-device`.

The references are the CPU of the same machine, transformers on it, and arithmetic in NumPy. These
tests also pass where the CPU is the only device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from benchmarks import chip
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import model as llava
from mllm_jax.models import attention
from mllm_jax.training import fit
from tests.helpers import random_inputs
from tests.models import attention_loop

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# Largest differences in float32, relative to the largest value. Products are float32 everywhere,
# but a GPU sums in another order, and a TPU multiplies float32 in six passes of bfloat16.
BOUND = {"cpu": 2e-5, "gpu": 1e-4, "tpu": 1e-4}[jax.default_backend()]
# The distance of bfloat16 from float32 is at most this many times what it is on the CPU.
NARROW = {"cpu": 1.0, "gpu": 2.0, "tpu": 2.0}[jax.default_backend()]
CPU = jax.local_devices(backend="cpu")[0]
CONFIG = llava.LlavaConfig.of(
    random_inputs.TINY.vision, random_inputs.TINY.lm, fold=1, image_token=95
)
LAYER, NEURONS = 1, np.array([3, 4, 17])


def apart(value: Any, reference: Any) -> float:
    """Return the largest difference, relative to the largest value."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def on_cpu(run: Callable[[Any], Any], model: Any) -> Any:
    """Run on the CPU of this machine."""
    with chip.default_device(CPU):
        return run(jax.tree.map(jnp.asarray, jax.device_get(model)))


@pytest.mark.parametrize(
    ("kind", "T"), [*((kind, 48) for kind in attention_loop.KINDS), ("none", 600), ("padding", 600)]
)
def test_attention_of_bfloat16(kind, T):
    """By cuDNN on NVIDIA GPUs, and in blocks on TPUs where rows are long; a loop on the CPU."""
    rng, (B, N, K, H) = np.random.default_rng(0), (2, 4, 2, 64)
    query = rng.normal(size=(B, T, N, H))
    key, value = rng.normal(size=(2, B, K, T, H))
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)]
    mask = attention_loop.masks(kind, rng, B, N, T, T)
    causal = kind not in ("none", "vision", "forward")
    attend = functools.partial(attention.attend, mask=mask, causal=causal)
    heads, back = jax.vjp(jax.jit(attend), *arrays)
    weight = jnp.asarray(rng.normal(size=heads.shape), jnp.bfloat16)
    slopes = back(weight)
    want = attention_loop.attend_in_a_loop(*arrays, mask, weight, H**-0.5, None)
    for got, reference in zip((heads, *slopes), (want[0], *want[1]), strict=True):
        attention_loop.assert_near(got, reference, 1e-2)


@pytest.fixture(scope="module")
def model():
    return random_inputs.random_model(CONFIG)


@pytest.fixture(scope="module")
def batch():
    return random_inputs.make_batch(CONFIG)


@pytest.fixture(scope="module")
def logits(model, batch) -> np.ndarray:
    return np.asarray(mj.run(model, batch, logits="all").logits)


def test_parity_with_transformers(batch):
    hf = pytest.importorskip("tests.helpers.hf", exc_type=ImportError)
    network = hf.random(hf.transformers.LlavaForConditionalGeneration(hf.llava_config(CONFIG)))
    ours = mj.run(hf.transfer(CONFIG, network), batch, logits="all").logits
    real = np.asarray(batch.valid)
    with hf.torch.inference_mode():
        theirs = network.eval()(
            input_ids=hf.torch.tensor(np.asarray(batch.ids, np.int64)),
            pixel_values=hf.torch.tensor(np.asarray(batch.pixels).transpose(0, 3, 1, 2)),
            attention_mask=hf.torch.tensor(real.astype(np.int64)),
        ).logits.numpy()
    assert apart(np.asarray(ours)[real], theirs[real]) <= BOUND


def test_float32_is_float32(model, batch, logits):
    """Products in TF32 or in one pass of bfloat16 would be off by 1e-3 and more."""
    reference = on_cpu(lambda m: np.asarray(mj.run(m, batch, logits="all").logits), model)
    assert apart(logits, reference) <= BOUND


def test_bfloat16_is_as_far_from_float32_as_on_the_cpu(model, batch):
    def run(model):
        return np.asarray(mj.run(model, batch).logits, np.float32)

    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    exact = on_cpu(run, model)
    distance = apart(on_cpu(run, narrow), exact)
    assert 1e-4 < distance < 0.1
    assert apart(run(narrow), exact) <= NARROW * distance


def test_an_ablation_is_a_model_without_the_neurons(model, batch, logits):
    edited = mj.run(model, batch, mj.ablate(S.lm.mlp.act[LAYER, NEURONS]), logits="all").logits
    down = model.lm.layers.mlp.down
    kernel = np.array(down.kernel[...])
    kernel[LAYER, NEURONS] = 0
    layers = jax.tree.map(lambda leaf: leaf, model)
    layers.lm.layers.mlp.down.kernel[...] = jnp.asarray(kernel)
    without = mj.run(layers, batch, logits="all").logits
    edited, without, clean = (np.asarray(x)[batch.valid] for x in (edited, without, logits))
    assert apart(edited, without) <= BOUND < 0.01 < apart(edited, clean)  # padding is not edited


def test_counts_and_means_are_those_of_numpy(model, batch):
    site = S.lm.mlp.act
    statistics = mj.reduce({"n": mj.stats(site)}, model, [batch, batch])
    values = np.asarray(mj.run(model, batch, None, {"x": mj.keep(site)})["x"])
    values = values[:, np.asarray(batch.valid)]
    near = np.abs(values) < 1e-6  # may round to either side
    positive = statistics["n"].positive
    expected = 2 * (values > 0).sum(1)
    assert (np.abs(positive - expected) <= 2 * near.sum(1)).all() and expected.max() > 10
    assert apart(statistics["n"].mean, values.mean(1)) <= BOUND


def test_a_sweep_is_its_edits_one_by_one(model, batch):
    edits = [mj.ablate(S.lm.mlp.act[layer, NEURONS]) for layer in range(CONFIG.lm.layers)]
    swept = mj.sweep(last_logits, model, batch, edits)
    alone = [np.asarray(mj.run(model, batch, edit).logits) for edit in edits]
    assert swept.shape[0] == len(edits) and apart(swept, alone) <= BOUND
    assert all(apart(one, alone[0]) > 0.01 for one in alone[1:])


def last_logits(out):
    return out.logits


def test_decoding_is_a_pass_over_the_whole_row(model, batch):
    """Every token but the first is computed from the cache."""
    steps, vector = 3, np.ones(CONFIG.lm.width, np.float32)
    edits = mj.add(S.lm.resid_post[LAYER], vector, where=tok.text)
    generated = mj.generate(model, batch, edits, max_new_tokens=steps).tokens
    cpu = on_cpu(
        lambda m: np.asarray(mj.generate(m, batch, edits, max_new_tokens=steps).tokens), model
    )
    assert np.array_equal(generated, cpu)
    answers = np.asarray(generated)[:, None]
    scores = mj.score(model, batch, answers, edits)
    assert apart(scores, on_cpu(lambda m: mj.score(m, batch, answers, edits), model)) <= BOUND


@pytest.fixture(scope="module")
def lesson(model, batch):
    """Two batches with answers and vision features."""
    T = batch.ids.shape[1]
    labels = np.broadcast_to(np.arange(T - 5, T - 3, dtype=np.int32), (len(batch.ids), 2))
    grid = (len(batch.pixels), CONFIG.vision.grid**2, CONFIG.vision.width)
    features = np.random.default_rng(0).standard_normal(grid, np.float32)
    batch = batch.replace(labels=labels, features=features, pixels=None)
    return [batch, batch]


@pytest.mark.parametrize("part", ["projector", "lora"])
def test_training_is_that_of_the_cpu_and_the_same_every_time(part, model, lesson):
    def losses(model):
        return fit.fit(model, lesson, fit.Recipe(part=part, rate=0.01, warmup=0.0))[1]

    curve = losses(model)
    assert curve[1] < curve[0] - 0.01
    assert apart(curve, on_cpu(losses, model)) <= 10 * BOUND  # of weights after a step of AdamW
    assert np.array_equal(curve, losses(model))


def test_results_are_the_same_every_time(model, batch):
    """Bit by bit: no statistic is summed by atomics in the order of arrival."""
    captures = {"s": mj.stats(S.lm.mlp.act, by=tok.kind), "top": mj.top(S.lm.mlp.act, k=2)}
    runs = [jax.tree.leaves(mj.reduce(captures, model, [batch, batch])) for _ in range(2)]
    assert all(map(np.array_equal, *runs))
