"""Collected vectors are the kept activations of the selected tokens, with their places."""

from __future__ import annotations

import pathlib
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch.utils.data

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.passes import collect as collect_
from mllm_jax.store import stamps

CAPTURES = {
    "image": mj.keep(S.lm.resid_post[2], where=tok.image),
    "layers": mj.keep(S.lm.mlp.act[[0, 3], [5, 7, 11]], where=tok.last),
    "heads": mj.keep(S.lm.attn.heads[1], where=tok.question),
    "tower": mj.keep(S.vision.resid_post[1], where=tok.image),
}
IMAGES, WORDS = (1, 2), (9, 5)


@pytest.fixture(scope="module")
def batches(make_batch):
    """Rows of unequal length, a tile that is nobody's, and in one batch a row that is empty."""
    made = [make_batch(images=IMAGES, words=WORDS, pad="left", fill=1, seed=s) for s in range(4)]
    map_ = made[1].tokens
    map_.kind[0], map_.last[0] = tok.CODE["pad"], False
    made[1].image_token_index[0] = -1
    return made


@pytest.fixture(scope="module")
def collected(tiny_model, batches, tmp_path_factory):
    path = tmp_path_factory.mktemp("collected") / "all"
    return mj.collect(CAPTURES, tiny_model, batches, path, dtype="float32")


@pytest.fixture(scope="module")
def kept(tiny_model, batches):
    """What `run` keeps of each batch."""
    return [mj.run(tiny_model, batch, None, CAPTURES, logits="none").captures for batch in batches]


def loop(model, batches, kept_of_all, name):
    """The vectors of a capture by a loop over kept tensors: (value, example, token, ...)."""
    found, first = [], 0
    site = CAPTURES[name].address.site
    for batch, captured in zip(batches, kept_of_all, strict=True):
        kept = np.asarray(captured[name])
        tiles = site.module == "vision"
        map_ = model.token_maps(batch)["vision" if tiles else "lm"]
        where = np.asarray(CAPTURES[name].where.mask(map_))
        real = np.asarray(batch.valid).any(-1)
        readers = np.asarray(model.config.readers(batch))
        for b in range(len(where)):
            row = int(np.flatnonzero(readers[:, b])[0]) if tiles and readers[:, b].any() else b
            if tiles and not readers[:, b].any():
                continue
            count = 0
            for t in range(where.shape[1]):
                if where[b, t]:
                    place = [int(getattr(map_, n)[b, t]) for n in ("tile", "row", "column")]
                    example = first + int(real[:row].sum())
                    value = kept[:, b, t] if name == "layers" else kept[b, t]
                    found.append((value, example, t if tiles else count, *place))
                count += int(map_.kind[b, t] != tok.CODE["pad"])
        first += int(real.sum())
    return found


@pytest.mark.parametrize("name", CAPTURES)
def test_vectors_are_those_of_a_loop(name, tiny_model, batches, kept, collected):
    want, source = loop(tiny_model, batches, kept, name), collected[name]
    assert len(source) == len(want) > 6 and source.dtype == np.float32
    assert source.shape == want[0][0].shape and collected.examples == 7
    order = np.random.default_rng(0).permutation(len(want))
    got = source[order]
    for field, column in zip(got._fields[1:], zip(*[w[1:] for w in want]), strict=True):
        np.testing.assert_array_equal(getattr(got, field), np.array(column)[order], err_msg=field)
    np.testing.assert_array_equal(got.value, np.stack([w[0] for w in want])[order])


def test_it_is_a_data_source(collected):
    """As `grain.sources.RandomAccessDataSource` and the loaders of PyTorch use one."""
    source = collected["image"]
    whole = source[:]
    one, some = source[3], source.__getitems__([3, 8])
    assert isinstance(one, collect_.Vectors) and one.value.shape == source.shape
    for got, at in ((one, 3), (some[0], 3), (some[1], 8), (source[-1], len(source) - 1)):
        for field in whole._fields:
            np.testing.assert_array_equal(getattr(got, field), getattr(whole, field)[at])
    with pytest.raises(IndexError, match=f"row {len(source)} of {len(source)}"):
        source[len(source)]
    mask = whole.column == 1
    np.testing.assert_array_equal(source[mask].value, whole.value[mask])
    for wrong in (mask[1:], np.array([1.5]), np.array([[0, 1], [2, 3]]), ["1"]):
        with pytest.raises(IndexError, match="an index of image is an integer, a slice"):
            source[wrong]
    assert not len(source[[]].value)
    again = pickle.loads(pickle.dumps(source))  # for the processes of a loader
    np.testing.assert_array_equal(again[:].value, whole.value)
    loader = torch.utils.data.DataLoader(source, batch_size=4, collate_fn=list)
    np.testing.assert_array_equal([v.value for v in next(iter(loader))], whole.value[:4])


def test_latents_of_a_splice_are_collected(tiny_model, batches, tmp_path):
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 6), (6, 32)))
    encoder, decoder = weights
    dictionary = Dictionary(
        encoder=encoder, encoder_bias=np.zeros(6), decoder=decoder, decoder_bias=np.zeros(32)
    )
    splice, latents = mj.splice(S.lm.resid_post[2], dictionary), S.lm.resid_post.latents[2]
    asked = {"z": mj.keep(latents, where=tok.image), "x": CAPTURES["image"]}
    found = mj.collect(asked, tiny_model, batches[:1], tmp_path / "z", splice, dtype="float32")
    want = np.maximum(found["x"][:].value @ encoder, 0)
    assert found["z"].shape == (6,)
    np.testing.assert_allclose(found["z"][:].value, want, atol=1e-5)


def test_shuffled_reads_each_vector_once(collected):
    source = collected["image"]
    orders = []
    for seed in (0, 0, 1):
        parts = list(source.shuffled(5, seed=seed))
        orders.append(
            [tuple(p) for part in parts for p in zip(part.example, part.tile, part.token)]
        )
        assert len(parts) == -(-len(source) // 5)
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert len(set(orders[0])) == len(source)
    assert all(len(p.value) == 5 for p in source.shuffled(5, seed=0, drop_last=True))


def test_bfloat16_is_rounded_once(tiny_model, batches, collected, tmp_path):
    source = mj.collect(CAPTURES, tiny_model, batches, tmp_path / "x")["image"]
    assert source.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        source[:].value, collected["image"][:].value.astype(ml_dtypes.bfloat16)
    )


def content(folder: pathlib.Path):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != stamps.NAME}


class Killed(BaseException):
    pass


@pytest.fixture
def passes(monkeypatch):
    """How many passes are run."""
    counts = []

    def counted(*args, run=collect_.run, **how):
        counts.append(args)
        return run(*args, **how)

    monkeypatch.setattr(collect_, "run", counted)
    return counts


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_interrupted_it_ends_with_the_same_bytes(
    shard_bytes, tiny_model, batches, tmp_path, passes
):
    how = {"shard_bytes": shard_bytes}
    mj.collect(CAPTURES, tiny_model, batches, tmp_path / "whole", **how)

    def killed():
        yield from batches[:2]
        raise Killed

    with pytest.raises(Killed):
        mj.collect(CAPTURES, tiny_model, killed(), tmp_path / "parts", **how)
    mj.collect(CAPTURES, tiny_model, iter(batches), tmp_path / "parts", **how)
    assert len(passes) == 4 + 2 + (2 if shard_bytes == 1 else 4)  # a shard that is full stays
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    mj.collect(CAPTURES, tiny_model, batches, tmp_path / "parts", **how)
    assert len(passes) == 4 + 2 + (2 if shard_bytes == 1 else 4)
    edits = mj.scale(S.lm.mlp.act[1], 2.0)
    fewer = {name: capture for name, capture in CAPTURES.items() if name != "heads"}
    for captures, other, says in (
        (CAPTURES, {"edits": edits}, "edits"),
        (fewer, {}, r"captures \(heads\)"),
        (CAPTURES, {"dtype": "float32"}, r"settings \(dtype\)"),
    ):
        with pytest.raises(
            ValueError, match=f"record.json was made for .* differs in {says}; give"
        ):
            mj.collect(captures, tiny_model, batches, tmp_path / "parts", **how | other)
    mj.collect(CAPTURES, tiny_model, batches[:1], tmp_path / "grown", **how)
    mj.collect(CAPTURES, tiny_model, batches, tmp_path / "grown", **how)
    assert content(tmp_path / "grown") == content(tmp_path / "whole")


def test_a_patch_of_shared_pictures(tiny_model, make_batch, tmp_path):
    """Rows that share a picture are given one each by a patch, and so are the places."""
    batch = make_batch(images=(1, 1), words=(6, 6))
    batch.image_token_index[1] = batch.image_token_index[0]
    edit = mj.patch(S.vision.resid_post[0], source=0, into=1)
    captures = {"x": mj.keep(S.vision.resid_post[1], where=tok.image)}
    source = mj.collect(captures, tiny_model, [batch], tmp_path / "x", edit)["x"]
    assert np.unique(source[:].example).tolist() == [0, 1]


def test_the_size_is_said_and_what_cannot_fit_is_refused(
    tiny_model, batches, tmp_path, capsys, monkeypatch
):
    mj.collect(CAPTURES, tiny_model, batches[:1], tmp_path / "x", dtype="float32")
    shard = safetensors.numpy.load_file(tmp_path / "x" / "00000000-00000001.safetensors")
    size = sum(array.nbytes for array in shard.values())
    said = (
        f"collect: {collect_._readable(size)} for 1 batches, {collect_._readable(size / 2)} an ex"
    )
    assert said in capsys.readouterr().err
    for free, fits in ((size * 4, True), (size * 4 - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
        if fits:
            mj.collect(CAPTURES, tiny_model, batches, tmp_path / "y", dtype="float32")
            continue
        with pytest.raises(OSError, match="does not fit in .* are free: select fewer") as refused:
            mj.collect(CAPTURES, tiny_model, batches, tmp_path / "z", dtype="float32")
        assert len(str(refused.value)) < 400 and not (tmp_path / "z").exists()


class Usage:
    def __init__(self, free):
        self.free = free


def test_errors(tiny_model, batches, tmp_path):
    for capture, says in (
        (mj.stats(S.lm.mlp.act), r"'x' \(stats of lm.mlp.act\) has no vector"),
        (mj.keep(S.lm.attn.pattern[0]), r"'x' \(keep of lm.attn.pattern\) has no vector"),
    ):
        with pytest.raises(ValueError, match=says):
            mj.collect({"x": capture}, tiny_model, batches, tmp_path / "x")
    some = {"image": CAPTURES["image"]}
    with pytest.raises(ValueError, match='dtype="int8" is not one of bfloat16, float32'):
        mj.collect(some, tiny_model, batches, tmp_path / "x", dtype="int8")
    with pytest.raises(ValueError, match="collect: there was no batch"):
        mj.collect(some, tiny_model, [], tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="holds no collection"):
        mj.read_collection(tmp_path / "x")
