"""The projector is HF's, and LLaVA's own where HF has none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.checkpoints.networks import projectors
from mllm_jax.families.idefics3 import keys as idefics3_keys
from mllm_jax.families.idefics3 import model as idefics3_model
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import binding
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Taps
from mllm_jax.models import decoder, projector, siglip
from tests.helpers import hf, towers


def config_of(**fields) -> llava.LlavaConfig:
    config = llava.LlavaConfig.tiny()
    return dataclasses.replace(
        config, projector=dataclasses.replace(config.projector, **fields, fold=1)
    )


def with_features(batch: Batch, config: llava.LlavaConfig, seed: int = 0) -> Batch:
    """A batch that reads features instead of pixels."""
    shape = (len(batch.is_real_tile), config.vision.grid**2, config.vision.width)
    features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return batch.replace(features=features)


@pytest.mark.parametrize(("bias", "act"), [(True, "gelu"), (False, "gelu_tanh"), (True, "relu")])
def test_two_maps_as_hf(bias, act, make_batch):
    config = config_of(bias=bias, act=act)
    theirs = hf.random(hf.modeling_llava.LlavaMultiModalProjector(hf.llava_config(config)))
    ours = hf.transfer(config, theirs, "multi_modal_projector.")
    batch = with_features(make_batch(config, images=(1, 2)), config)
    names = ("projector.act", "projector.out")
    want = hf.tensors(theirs, names, "multi_modal_projector.", image_features=batch.features)
    hf.assert_equal(ours, batch, want)


@pytest.mark.parametrize("depth", [1, 3])
def test_another_depth_as_the_original(depth, make_batch):
    # LLaVA's own builder: nn.Linear, then (nn.GELU, nn.Linear) for "mlpNx_gelu".
    config = config_of(depth=depth)
    E, D = config.vision.width, config.lm.width
    modules = [hf.torch.nn.Linear(E, D)]
    for _ in range(depth - 1):
        modules += [hf.torch.nn.GELU(), hf.torch.nn.Linear(D, D)]
    theirs = hf.random(hf.torch.nn.Sequential(*modules))
    prefix = "model.mm_projector" + (".0." if depth == 1 else ".")
    weights = theirs[0] if depth == 1 else theirs
    ours = hf.transfer(config, weights, prefix)
    batch = with_features(make_batch(config, images=(1, 2)), config)
    x, acts = hf.torch.from_numpy(batch.features), []
    with hf.torch.no_grad():
        for module in theirs:
            x = module(x)
            acts += [x.numpy()] if isinstance(module, hf.torch.nn.GELU) else []
    want = {"projector.out": x.numpy()} | ({"projector.act": np.stack(acts)} if acts else {})
    hf.assert_equal(ours, batch, want)
    assert ("projector.act" in site_shapes(ours, batch)) == (depth > 1)


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (6, 2), (6, 3), (4, 1)])
def test_fold_puts_neighbours_side_by_side(grid, side):
    x = np.random.default_rng(0).normal(size=(2, grid * grid, 5)).astype(np.float32)
    want = np.zeros((2, (grid // side) ** 2, side * side * 5), np.float32)
    for image in range(2):
        for row in range(grid):
            for column in range(grid):
                token = row // side * (grid // side) + column // side
                place = row % side * side + column % side
                patch = x[image, row * grid + column]
                want[image, token, place * 5 : (place + 1) * 5] = patch
    np.testing.assert_array_equal(projector.fold(x, side), want)


E, D = 24, 40  # the widths of the towers and language models below
FEATURES = np.random.default_rng(1).normal(size=(2, 36, E)).astype(np.float32)


def gemma3():
    module = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    config = hf.transformers.Gemma3Config(
        vision_config={"hidden_size": E, "image_size": 24, "patch_size": 4, "layer_norm_eps": 1e-3},
        text_config={"hidden_size": D, "num_attention_heads": 4},
        mm_tokens_per_image=4,
    )
    ours = projector.ProjectorConfig.pooled(E, D, pool=3, eps=1e-3)
    return module.Gemma3MultiModalProjector(config), ours, projectors.pooled


def paligemma():
    module = pytest.importorskip("transformers.models.paligemma.modeling_paligemma")
    config = hf.transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": E, "projection_dim": D},
        text_config={"model_type": "gemma", "hidden_size": D},
        projection_dim=D,
    )
    network = module.PaliGemmaMultiModalProjector(config)
    return network, projector.ProjectorConfig.linear(E, D), projectors.linear


def idefics3():
    module = pytest.importorskip("transformers.models.idefics3.modeling_idefics3")
    config = hf.transformers.Idefics3Config(
        vision_config={"hidden_size": E},
        text_config={"hidden_size": D, "num_attention_heads": 4},
        scale_factor=3,
    )
    ours = idefics3_model.Idefics3Config.of(
        siglip.SiglipConfig(width=E), decoder.DecoderConfig(width=D), fold=3
    ).projector
    return module.Idefics3Connector(config), ours, idefics3_keys.projector


class InternVl(hf.torch.nn.Module):
    """Their pixel shuffle before their projector."""

    def __init__(self):
        super().__init__()
        module = pytest.importorskip("transformers.models.internvl.modeling_internvl")
        config = hf.transformers.InternVLConfig(
            vision_config={"hidden_size": E},
            text_config={"hidden_size": D, "model_type": "qwen2", "num_attention_heads": 4},
        )
        self.shuffle = module.InternVLModel.pixel_shuffle
        self.projector = module.InternVLMultiModalProjector(config)

    def state_dict(self, *args, **kwargs):
        return self.projector.state_dict(*args, **kwargs)

    def forward(self, x):
        x = self.shuffle(None, x.reshape(len(x), 6, 6, E), scale_factor=0.5)
        return self.projector(x.reshape(len(x), 9, -1))


def internvl():
    return InternVl(), projector.ProjectorConfig.shuffled(E, D), projectors.shuffled


@pytest.mark.parametrize("build", [gemma3, paligemma, idefics3, internvl])
def test_other_projectors_as_hf(build):
    theirs, config, rows = build()
    hf.random(theirs)
    ours = towers.transfer(
        lambda: projector.Projector(config, rngs=nnx.Rngs(0)), rows("p", "ours"), theirs, "p."
    )
    names = ["projector.out"] + ["projector.act"] * (config.depth > 1)
    where = {"projector.act": "projector.act (output)"} if config.depth > 1 else {}
    want, acts = towers.hooked(theirs, where, hf.torch.from_numpy(FEATURES))
    tokens = np.ones((2, 36 // config.fold**2), bool)
    got, tensors = towers.run(ours, names, tokens, FEATURES)
    towers.assert_close(got, want.numpy(), "tokens")
    np.testing.assert_array_equal(tensors["projector.out"], got)
    if acts:
        towers.assert_close(tensors["projector.act"][0], acts["projector.act"][0], "act")


@pytest.mark.parametrize("bias", [True, False])
def test_mistral3_as_hf(bias):
    module = pytest.importorskip("transformers.models.mistral3.modeling_mistral3")
    made = hf.transformers.Mistral3Config(
        vision_config={"model_type": "pixtral", "hidden_size": E, "patch_size": 4},
        text_config={"model_type": "mistral", "hidden_size": D, "num_attention_heads": 4, "rms_norm_eps": 1e-3},
        spatial_merge_size=2, projector_hidden_act="gelu", multimodal_projector_bias=bias,
    )  # fmt: skip
    theirs = hf.random(module.Mistral3MultiModalProjector(made))
    config = projector.ProjectorConfig.merging(E, D, eps=1e-3, bias=bias)
    ours = towers.transfer(
        lambda: projector.Projector(config, rngs=nnx.Rngs(0)),
        projectors.merging("p", "ours"),
        theirs,
        "p.",
    )
    grids, rng = [(4, 6), (2, 4)], np.random.default_rng(0)
    rows = [rng.normal(size=(h, w, E)).astype(np.float32) for h, w in grids]  # row by row
    packed = hf.torch.from_numpy(np.concatenate([x.reshape(-1, E) for x in rows]))
    sizes = hf.torch.tensor(grids) * 4
    want, acts = towers.hooked(theirs, {"projector.act": "act (output)"}, packed, sizes)
    blocks = np.zeros((2, 24, E), np.float32)
    for i, x in enumerate(rows):
        h, w = grids[i]
        x = x.reshape(h // 2, 2, w // 2, 2, E).swapaxes(1, 2).reshape(-1, E)
        blocks[i, : len(x)] = x
    valid = np.arange(6) < np.array([[6], [2]])
    got, tensors = towers.run(ours, ["projector.act"], valid, blocks)
    towers.assert_close(got[valid], want.numpy(), "tokens")
    towers.assert_close(tensors["projector.act"][0][valid], acts["projector.act"][0], "act")


def test_edits_of_both_the_activation_and_deepstack():
    """Their numbers of layers differ: 1 and 3."""
    config = projector.ProjectorConfig.qwen(E, D, norm="layer", deepstack=3)
    module = projector.Projector(config, rngs=nnx.Rngs(0))
    features = np.random.default_rng(0).normal(size=(1, 8, 4 * E)).astype(np.float32)
    chain = mj.ablate(S.projector.act) >> mj.scale(S.projector.deepstack[1], 2.0)
    shapes = {
        "projector.act": S.SiteShape(1, (1, 2, 4 * E), np.dtype("float32")),
        "projector.deepstack": S.SiteShape(3, (1, 2, D), np.dtype("float32")),
    }
    maps = {
        "projector": tokens.TokenMap.grid(np.zeros(1, np.int16), (1, 2), True, np.ones(1, bool))
    }

    def both(edits):
        taps = Taps(binding.bind_edits(edits, shapes, maps))
        tap = taps.module("projector")
        deep = module.deepstack_tokens(features, tap)
        return module(features, tap), deep, taps.receipt_list()

    (clean, deep, _), (edited, scaled, receipts) = both(None), both(chain)
    np.testing.assert_allclose(edited, np.broadcast_to(module.linears[-1].bias[...], edited.shape))
    np.testing.assert_allclose(scaled, deep * np.array([1, 2, 1])[:, None, None, None], rtol=1e-6)
    assert np.abs(clean).max() > 1e-3 and np.abs(deep).min(-1).max() > 0
    np.testing.assert_array_equal(receipts[0].tokens, [2])
    np.testing.assert_array_equal(receipts[1].tokens, [0, 2, 0])
