"""The towers of the Qwens are those of transformers, for pictures of several sizes in a batch."""

from __future__ import annotations

import functools
import importlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.checkpoints.networks import projectors
from mllm_jax.checkpoints.networks import qwen_vision as network_
from mllm_jax.interventions import binding
from mllm_jax.interventions.tap import Taps
from mllm_jax.models import grids, projector, qwen_vision
from tests.helpers import hf, towers

GRIDS = np.array([(4, 6), (10, 8), (0, 0), (2, 2), (6, 10)], np.int32)
REAL, PLACES, OUT = [0, 1, 3, 4], 96, 24
CLASSES = {
    "2": ("qwen2_vl", "Qwen2VLVisionConfig", "Qwen2VisionTransformerPretrainedModel"),
    "2.5": ("qwen2_5_vl", "Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel"),
    "3": ("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
}
CONFIGS = {version: qwen_vision.QwenVisionConfig.tiny(version) for version in CLASSES}
KIND = {"2": "layer", "2.5": "rms", "3": "layer"}


def module_of(version):
    folder = CLASSES[version][0]
    return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")


@functools.cache
def network(version):
    folder, config, model = CLASSES[version]
    configs = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    fields = network_.to_hf(CONFIGS[version], version, OUT)
    made = getattr(configs, config)(**fields, **hf.ATTENTION)
    return hf.random(getattr(module_of(version), model)(made))


@functools.cache
def ours(version):
    config, theirs = CONFIGS[version], network(version)
    merger = projector.ProjectorConfig.qwen(
        config.width, OUT, norm=KIND[version], deepstack=len(config.deepstack)
    )
    rows = projectors.qwen3 if version == "3" else projectors.qwen2
    return (
        towers.transfer(
            lambda: qwen_vision.QwenVision(config, rngs=nnx.Rngs(0)),
            network_.vision("visual", "ours", config),
            theirs,
            "visual.",
            lambda key: "merger" in key,
        ),
        towers.transfer(
            lambda: projector.Projector(merger, rngs=nnx.Rngs(0)),
            rows("visual", "ours"),
            theirs,
            "visual.",
            lambda key: "merger" not in key,
        ),
    )


@functools.cache
def patches():
    """Of all pictures, and those of real ones one after the other; padding would be noticed."""
    rng = np.random.default_rng(0)
    counts = GRIDS.prod(1)
    x = rng.normal(size=(len(GRIDS), PLACES, CONFIGS["2"].pixels)).astype(np.float32)
    valid = np.arange(PLACES) < counts[:, None]
    x[~valid] = 1e3
    return x, valid


def places_in_their_order(version) -> np.ndarray:
    """Where each of their patches stands in the batch, as they order them inside the tower."""
    x, valid = patches()
    order = np.flatnonzero(valid)
    if version != "2.5":
        return order
    vision_utils = importlib.import_module("transformers.vision_utils")
    grid = hf.torch.tensor([[1, *GRIDS[i]] for i in REAL])
    config = CONFIGS[version]
    index, _ = vision_utils.get_vision_window_index(
        grid, spatial_merge_size=2, window_size=config.window * config.patch,
        patch_size=config.patch,
    )  # fmt: skip
    return order.reshape(-1, 4)[index.numpy()].reshape(-1)


@functools.cache
def reference(version):
    """Their output, and their tensors at our sites in the places of the batch."""
    theirs, module = network(version), module_of(version)
    x, valid = patches()
    inputs = hf.torch.from_numpy(x[valid]), hf.torch.tensor([[1, *GRIDS[i]] for i in REAL])
    weights, attend = [], module.eager_attention_forward

    def watch(*args, **kwargs):
        out = attend(*args, **kwargs)
        weights.append(out[1][0].numpy())
        return out

    module.eager_attention_forward = watch
    try:
        out, found = towers.hooked(theirs, network_.SITES, *inputs)
    finally:
        module.eager_attention_forward = attend
    at, layers, heads = places_in_their_order(version), CONFIGS[version].layers, 4

    def placed(array):
        full = np.zeros((len(GRIDS) * PLACES, array.shape[-1]), np.float32)
        full[at] = array
        return full.reshape(len(GRIDS), PLACES, -1)

    sites = {name: np.stack([placed(a) for a in arrays]) for name, arrays in found.items()}
    sites["vision.embed"] = sites["vision.embed"][0]
    sites["vision.attn.pattern"] = pattern = np.zeros((layers, len(GRIDS), heads, PLACES, PLACES))
    chunks = iter(weights)
    for layer in range(layers):
        start = 0
        while start < len(at):
            chunk = next(chunks)
            tile, place = divmod(at[start : start + chunk.shape[-1]], PLACES)
            assert len(set(tile)) == 1
            pattern[layer, tile[0]][np.ix_(range(heads), place, place)] = chunk
            start += chunk.shape[-1]
    assert next(chunks, None) is None
    return out, sites, placed


@pytest.mark.parametrize("version", CLASSES)
def test_every_site(version):
    _, want, _ = reference(version)
    tower, _ = ours(version)
    x, valid = patches()
    _, got = towers.run(tower, want, valid, x, GRIDS)
    for name, theirs in want.items():
        if name == "vision.attn.pattern":
            here = np.where(valid[:, None, :, None], got[name], 0)
            np.testing.assert_array_equal(here[..., ~valid.any(0)], 0)
            towers.assert_close(here, theirs.astype(np.float32), name)
        else:
            here = got[name].reshape(theirs.shape)
            axis = 0 if name == "vision.embed" else 1
            real = np.moveaxis(here, (axis, axis + 1), (0, 1))[valid]
            towers.assert_close(real, np.moveaxis(theirs, (axis, axis + 1), (0, 1))[valid], name)


@pytest.mark.parametrize("version", CLASSES)
def test_features_and_image_tokens(version):
    out, _, placed = reference(version)
    (tower, merger), config = ours(version), CONFIGS[version]
    x, valid = patches()
    features, _ = towers.run(tower, ["vision.embed"], valid, x, GRIDS)
    assert features.shape == (len(GRIDS), PLACES, config.feature_width)
    last = placed(out.last_hidden_state.numpy())
    towers.assert_close(features[..., : config.width][valid], last[valid], "features")
    merged = valid[:, ::4]
    tokens, _ = towers.run(merger, ["projector.out"], merged, features)
    towers.assert_close(tokens[merged], out.pooler_output.numpy(), "image tokens")
    if config.deepstack:
        name = "projector.deepstack"
        call = lambda merger, *inputs: merger.deepstack_tokens(*inputs)  # noqa: E731
        deep, captured = towers.run(merger, [name], merged, features, call=call)
        want = np.stack([part.numpy() for part in out.deepstack_features])
        towers.assert_close(deep[:, merged], want, name)
        np.testing.assert_array_equal(captured[name], deep)


def edited(version, edits):
    """Our features under edits, of real patches, and the receipts."""
    tower, _ = ours(version)
    x, valid = patches()
    maps = {"vision": tokens.TokenMap.free_grid(np.arange(len(GRIDS)), GRIDS, PLACES, 2)}
    clean = Taps()
    jax.eval_shape(lambda: tower(x, GRIDS, clean.module("vision")))
    bound = binding.bind_edits(edits, clean.shapes, maps)

    @jax.jit
    def run(tower):
        taps = Taps(bound)
        return tower(x, GRIDS, taps.module("vision")), taps.receipt_list()

    out, receipts = run(tower)
    return np.asarray(out)[valid], receipts


def hooked_heads(version, layer, change) -> np.ndarray:
    """Their features where a function has changed the heads of a layer, [seq, N, H]."""
    theirs = network(version)
    at = np.argsort(places_in_their_order(version))

    def hook(module, args):
        heads = args[0].numpy().copy().reshape(len(at), 4, -1)
        heads[at] = change(heads[at])
        return (hf.torch.from_numpy(heads.reshape(len(at), -1)),)

    handle = theirs.blocks[layer].attn.proj.register_forward_pre_hook(hook)
    x, valid = patches()
    with hf.torch.no_grad():
        grid = hf.torch.tensor([[1, *GRIDS[i]] for i in REAL])
        out = theirs(hf.torch.from_numpy(x[valid]), grid).last_hidden_state.numpy()
    handle.remove()
    return out[at]


def ablate_head(heads):
    heads[:, 2] = 0
    return heads


def add_in_row_1(heads):
    row = grids.Places.of(GRIDS, PLACES, 2).row
    heads[np.asarray(row)[patches()[1]] == 1] += 0.5
    return heads


@pytest.mark.parametrize("version", CLASSES)
@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (mj.ablate(S.vision.attn.heads[1, [2]]), ablate_head),
        (mj.add(S.vision.attn.heads[1], 0.5, where=tokens.row(1)), add_in_row_1),
    ],
    ids=["ablate", "add"],
)
def test_an_edit_is_a_hook(version, edit, change):
    width = CONFIGS[version].width
    got, (receipt,) = edited(version, edit)
    want = hooked_heads(version, 1, change)
    towers.assert_close(got[:, :width], want, "features")
    assert np.abs(want - hooked_heads(version, 1, lambda heads: heads)).max() > 1e-2
    count = GRIDS.prod(1).sum() if change is ablate_head else GRIDS[:, 1].sum()
    np.testing.assert_array_equal(receipt.tokens, [0, count, 0])


@pytest.mark.parametrize("version", CLASSES)
def test_a_knockout_is_a_mask_in_their_attention(version, monkeypatch):
    """No patch sees the first column of its picture in the layer of full attention."""
    module, theirs = module_of(version), network(version)
    attend = module.eager_attention_forward
    x, valid = patches()
    column = np.asarray(grids.Places.of(GRIDS, PLACES, 2).column)

    def hide(block, query, key, value, attention_mask, **kwargs):
        if block is theirs.blocks[1].attn:
            [tile] = [i for i in REAL if GRIDS[i].prod() == key.shape[2]]
            place = np.arange(PLACES)[valid[tile]]
            if version == "2.5":
                at = places_in_their_order(version)
                place = at[at // PLACES == tile] % PLACES
            hidden = np.where(column[tile, place] == 0, np.finfo(np.float32).min, 0)
            attention_mask = hf.torch.from_numpy(hidden.astype(np.float32))
        return attend(block, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", hide)
    want = hooked_heads(version, 1, lambda heads: heads)
    edit = mj.knockout(S.vision.attn[1], to=tokens.every, on=tokens.column(0))
    got, (receipt,) = edited(version, edit)
    towers.assert_close(got[:, : CONFIGS[version].width], want, "features")
    cut = 4 * (GRIDS.prod(1) * GRIDS[:, 0]).sum()
    np.testing.assert_array_equal(receipt.elements, [0, cut, 0])


def test_padding_never_matters():
    """Neither what stands in it, nor how much of it there is, nor the other pictures."""
    x, valid = patches()
    for version in CLASSES:
        tower, _ = ours(version)
        want, _ = towers.run(tower, ["vision.embed"], valid, x, GRIDS)
        y = np.where(valid[..., None], x, -7).astype(np.float32)
        got, _ = towers.run(tower, ["vision.embed"], valid, y, GRIDS)
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got[valid], want[valid])
        alone, _ = towers.run(tower, ["vision.embed"], valid[:1, :24], x[:1, :24], GRIDS[:1])
        np.testing.assert_allclose(alone[0], want[0, :24], rtol=0, atol=1e-5)


def test_one_program_for_all_sizes():
    tower, _ = ours("3")
    x, _ = patches()
    traced = []

    @jax.jit
    def run(grid):
        traced.append(1)
        return tower(x, grid, Taps().module("vision"))

    for grid in (GRIDS, GRIDS[::-1].copy(), np.full_like(GRIDS, 8)):
        run(grid)
    assert len(traced) == 1


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_places_are_those_of_a_loop(merge):
    grid = np.array([(2 * merge, 3 * merge), (merge, merge), (0, 0), (4 * merge, merge)], np.int32)
    count = 8 * merge**2
    places = grids.Places.of(grid, count, merge)
    for i, (rows, columns) in enumerate(grid):
        want = [
            (r + dr, c + dc)
            for r in range(0, rows, merge) for c in range(0, columns, merge)
            for dr in range(merge) for dc in range(merge)
        ]  # fmt: skip
        np.testing.assert_array_equal(places.valid[i], np.arange(count) < len(want))
        got = np.stack([places.row[i], places.column[i]], 1)[: len(want)]
        np.testing.assert_array_equal(got, np.array(want, int).reshape(-1, 2))
    map_ = tokens.TokenMap.free_grid(np.arange(4), grid, count, merge)
    np.testing.assert_array_equal(places.valid, map_.kind != tokens.CODE["pad"])
    for ours, theirs in ((places.row, map_.row), (places.column, map_.column)):
        np.testing.assert_array_equal(np.where(places.valid, ours, -1), theirs)


@pytest.mark.parametrize("version", CLASSES)
def test_config_comes_back(version):
    problems: list[str] = []
    fields = network_.read(network(version).config.to_dict(), version, problems)
    assert not problems
    assert network_.config(fields, version) == CONFIGS[version]


@pytest.mark.parametrize(
    ("version", "fields", "problem"),
    [
        ("2.5", {"window_size": 100}, "window_size=100 is not a multiple of patch_size x spatial"),
        ("2.5", {"fullatt_block_indexes": [7, 40]}, r"\[7, 40\] are not layers in order"),
        ("3", {"deepstack_visual_indexes": [16, 8]}, r"\[16, 8\] are not layers in order"),
        ("3", {"num_position_embeddings": 2305}, "2305 is not a square"),
        ("2", {"model_type": "qwen3_vl"}, "model_type='qwen3_vl' is not supported"),
    ],
)
def test_a_wrong_config_is_refused(version, fields, problem):
    problems: list[str] = []
    network_.read(fields, version, problems)
    assert len(problems) == 1 and re.search(problem, problems[0]), problems
