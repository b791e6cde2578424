"""Both towers are HF's CLIPModel, and so is how well a text fits a picture."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax.interventions.tap import Taps
from mllm_jax.loading import clip as checkpoints
from tests.helpers import hf, tiny_clip

BOUND = 1e-5
END = tiny_clip.letters()["<|endoftext|>"]
# Ends in the middle, several ends, none before the last.
IDS = np.array([[512, 3, 4, END, 0, 0], [512, 7, END, END, END, END], [512, 9, 2, 8, 4, END]])
PIXELS = np.random.default_rng(0).normal(size=(4, tiny_clip.SIDE, tiny_clip.SIDE, 3)).astype("f4")


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    theirs = tiny_clip.write(directory, text={"hidden_act": request.param})
    return checkpoints.load(directory)[0], theirs


def read(network, **inputs):
    with hf.torch.no_grad():
        return network(**{name: hf.torch.tensor(value) for name, value in inputs.items()})


def theirs_of(network):
    return read(network, input_ids=IDS, pixel_values=PIXELS.transpose(0, 3, 1, 2))


def assert_near(ours, theirs):
    assert np.abs(theirs.numpy()).max() > 0.1
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=0, atol=BOUND)


def test_towers_and_logits(pair):
    ours, theirs = pair
    tower = read(theirs.text_model, input_ids=IDS).pooler_output
    assert_near(jax.jit(lambda m: m.text(IDS))(ours), tower)
    seen = read(theirs.vision_model, pixel_values=PIXELS.transpose(0, 3, 1, 2)).pooler_output
    tower = jax.jit(lambda m: m.vision_norm(m.vision(PIXELS, Taps().module("vision"))[:, 0]))(ours)
    assert_near(tower, seen)
    want = theirs_of(theirs)
    pictures, texts = jax.jit(lambda m: (m.pictures(PIXELS, Taps()), m.texts(IDS)))(ours)
    assert_near(pictures, want.image_embeds)
    assert_near(texts, want.text_embeds)
    assert_near(ours.logits(pictures, texts), want.logits_per_image)


def test_what_comes_after_the_end_is_not_seen(pair):
    ours, _ = pair
    other = np.where(np.cumsum(IDS == END, 1) - (IDS == END) > 0, 11, IDS)
    assert (other != IDS).any()
    np.testing.assert_array_equal(ours.texts(other), ours.texts(IDS))


def test_older_configs_end_a_text_at_its_highest_id(tmp_path):
    theirs = tiny_clip.write(tmp_path, text={"eos_token_id": 2})
    ours, _ = checkpoints.load(tmp_path)
    assert ours.config.text.end is None
    assert_near(ours.texts(IDS), theirs_of(theirs).text_embeds)  # a 2 stands in the last
