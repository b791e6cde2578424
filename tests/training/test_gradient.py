"""The gradient of what trains is torch's, of the loss that transformers computes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax.families.llava import model as llava
from mllm_jax.training import losses, parts

torch = pytest.importorskip("torch")

CONFIG = llava.LlavaConfig.of(llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95)
PROJECTOR = "model.multi_modal_projector."
LAYER = "model.language_model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_of_the_projector_and_the_language_model(remat, make_batch):
    from tests.helpers import hf

    theirs = hf.random(hf.transformers.LlavaForConditionalGeneration(hf.llava_config(CONFIG)))
    ours = hf.transfer(CONFIG, theirs)
    batch = make_batch(CONFIG, images=(1, 1), words=(11, 8))
    ends = batch.valid.sum(-1)
    labels = np.stack([ends - 3, ends - 2, ends - 1, [-1, ends[1] - 4]], -1).astype(np.int32)
    batch = batch.replace(labels=labels)

    wanted = np.full(batch.ids.shape, -100)
    for row, places in enumerate(labels):
        wanted[row, places[places >= 0]] = batch.ids[row, places[places >= 0]]
    inputs = {
        "input_ids": batch.ids.astype(int),
        "attention_mask": batch.valid.astype(int),
        "pixel_values": batch.pixels.transpose(0, 3, 1, 2),
        "labels": wanted,
    }
    loss = theirs(**{name: torch.from_numpy(value.copy()) for name, value in inputs.items()}).loss
    loss.backward()
    theirs = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}

    merge, trained, frozen = parts.partition(ours, "projector+lm")

    @jax.jit
    def value_and_slope(trained, frozen, batch):
        def mean(trained):
            sums, counts = losses.answer_nll(merge(trained, frozen), batch, remat=remat)
            return sums.sum() / counts.sum()

        return jax.value_and_grad(mean)(trained)

    value, slope = value_and_slope(trained, frozen, batch)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    projector = slope["projector"]
    for i in (0, 1):
        want = theirs[f"{PROJECTOR}linear_{i + 1}.weight"].T
        assert np.abs(want).max() > 0.01
        got = projector[f"projector.linears.{i}.kernel"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        want = theirs[f"{PROJECTOR}linear_{i + 1}.bias"]
        np.testing.assert_allclose(projector[f"projector.linears.{i}.bias"], want, atol=1e-5)
    down = slope["lm"]["lm.layers.mlp.down.kernel"][2]
    np.testing.assert_allclose(down, theirs[LAYER].T, rtol=0, atol=1e-5)
