"""The whole of LLaVA is HF's; the sizes of the real ones are those of the real ones."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import tap
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.passes import run
from tests.helpers import hf

# At every site, from pixels to logits.
SITES = (
    "vision.embed", "projector.act", "projector.out", "lm.embed", "lm.resid_pre",
    "lm.attn.pattern", "lm.attn_out", "lm.mlp.act", "lm.resid_post", "lm.norm", "logits",
)  # fmt: skip


@functools.cache
def pair(select: str) -> tuple[hf.transformers.LlavaForConditionalGeneration, llava.Llava]:
    vision = dataclasses.replace(llava.ClipConfig.tiny(), select=select)
    config = llava.LlavaConfig.of(vision, llava.DecoderConfig.tiny(), image_token=95)
    theirs = hf.random(hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config)))
    return theirs, hf.transfer(config, theirs)


@pytest.mark.parametrize("select", ["patch", "full"])
@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize(
    ("images", "words"),
    [((1, 1, 1), (9, 9, 9)), ((1, 0, 2), (9, 7, 6)), ((2, 1, 0), (4, 12, 5))],
)
def test_every_site(images, words, pad, select, make_batch):
    theirs, ours = pair(select)
    batch = make_batch(ours.config, images=images, words=words, pad=pad, length=46)
    want = hf.tensors(
        theirs,
        SITES,
        input_ids=batch.ids.astype(int),
        attention_mask=batch.valid.astype(int),
        position_ids=batch.position.astype(int),
        pixel_values=batch.pixels.transpose(0, 3, 1, 2),
    )
    hf.assert_equal(ours, batch, want)


def test_text_alone(make_batch):
    theirs, ours = pair("patch")
    batch = make_batch(ours.config, images=(0, 0), words=(9, 9))
    want = hf.tensors(theirs, ("lm.embed", "logits"), input_ids=batch.ids.astype(int))
    hf.assert_equal(ours, batch, want)
    assert not any(name.startswith("vision") for name in site_shapes(ours, batch))


def test_a_row_alone_is_the_row_in_its_batch(make_batch, tiny_model):
    batch = make_batch(images=(1, 2), pad="left")
    alone = make_batch(images=(1,), words=(11,))
    ours = [run.run(tiny_model, b).logits[0] for b in (batch, alone)]
    np.testing.assert_allclose(*ours, rtol=0, atol=1e-5)


def test_images_that_fill_the_batch_change_nothing(make_batch, tiny_model):
    batches = make_batch(images=(1, 2), pad="left"), make_batch(images=(1, 2), pad="left", fill=2)
    ours = [run.run(tiny_model, b).logits for b in batches]
    np.testing.assert_allclose(*ours, rtol=0, atol=1e-5)


def test_the_id_under_an_image_token_does_not_matter(make_batch, tiny_model):
    batch = make_batch(images=(1, 2), pad="left")
    beyond = batch.replace(
        ids=np.where(batch.image_token_index >= 0, 10**6, batch.ids).astype(np.int32)
    )
    ours = [run.run(tiny_model, b).logits for b in (batch, beyond)]
    np.testing.assert_array_equal(*ours)


def test_features_stand_in_for_pixels(make_batch, tiny_model):
    batch = make_batch(images=(1, 2), pad="left")
    features = jax.jit(lambda m, b: m.features(b, tap.Taps()))(tiny_model, batch)
    given = batch.replace(features=features, pixels=np.zeros_like(batch.pixels))
    ours = [run.run(tiny_model, b).logits for b in (batch, given)]
    np.testing.assert_allclose(*ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (llava.LlavaConfig.llava_1_5_7b(), 7_063_427_072),
        (llava.LlavaConfig.llava_1_5_13b(), 13_351_494_656),
    ],
)
def test_size_of_the_real_ones(config, known):
    with hf.torch.device("meta"):
        theirs = hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config))
    sizes = {name: p.numel() for name, p in theirs.named_parameters()}
    assert sum(sizes.values()) == known
    above = [n for n in sizes if "post_layernorm" in n or "encoder.layers.23." in n]
    assert len(above) == 18  # the layer after the one that is read, and the norm after that
    ours = nnx.eval_shape(lambda: llava.Llava(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
    assert count == known - sum(sizes[name] for name in above)
