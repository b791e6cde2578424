"""Vision features are computed once, also when the run is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import types

import jax
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import features
from mllm_jax.interventions.tap import Taps
from tests.helpers import study_checkpoints, tiny


@pytest.fixture(scope="module")
def examples():
    return [types.SimpleNamespace(image=tiny.picture(i)) for i in range(5)]


class Killed(BaseException):
    pass


def test_features_are_those_of_the_tower(tiny_model, examples, tmp_path):
    processor = tiny.processor(tiny_model.config)
    path = tmp_path / "deep" / "features.npy"

    def read(some):
        return features.vision_features(tiny_model, processor, some, path, batch_size=2)

    class Until(list):
        def __getitem__(self, i):
            if i == 3:
                raise Killed
            return super().__getitem__(i)

    with pytest.raises(Killed):
        read(Until(examples))
    assert np.load(path).any((1, 2)).tolist() == [True, True, False, False, False]

    read_again = []
    with pytest.MonkeyPatch.context() as patch:
        one = features.encode_pictures
        patch.setattr(features, "encode_pictures", lambda *a: read_again.append(1) or one(*a))
        found = read(examples)
        assert len(read_again) == 2
        np.testing.assert_array_equal(read(examples), found)
        assert len(read_again) == 2, "done already"
    batch = processor([e.image for e in examples], ["<image>"] * 5)
    batch = batch.replace(processor=None)
    want = jax.jit(lambda model, batch: model.features(batch, Taps()))(tiny_model, batch)
    assert found.shape == (5, 16, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


VISION = mj.ablate(S.vision.mlp.act[1, [3, 5]]) >> mj.add(S.vision.resid_post[0], np.ones(32))
OTHERS = mj.ablate(S.projector.act[0, [1]]) >> mj.scale(S.lm.mlp.act[2], 3.0, where=tok.image)


@pytest.mark.parametrize(
    "edits",
    [
        None,
        VISION,
        OTHERS,
        OTHERS >> VISION,
        mj.patch(S.vision.resid_post[1], source=1, into=0) >> OTHERS,
    ],
    ids=["nothing", "vision", "others", "both", "patch"],
)
def test_pictures_that_are_read_before_are_those_of_the_pass(tiny_model, make_batch, edits):
    batch = make_batch()
    want = mj.run(tiny_model, batch, edits).logits
    read, others = features.read_pictures(tiny_model, batch, edits)
    assert read.features is not None
    assert not any(edit.address.site.module == "vision" for edit in others)
    read = read.replace(pixels=np.full_like(batch.pixels, np.nan))  # which nothing reads again
    np.testing.assert_allclose(mj.run(tiny_model, read, others).logits, want, atol=1e-5)


@pytest.fixture
def read(tiny_model, tmp_path):
    def read(some, model=tiny_model, aspect="square"):
        processor = tiny.processor(model.config)
        processor.image_aspect_ratio = aspect
        return features.vision_features(
            model, processor, some, tmp_path / "features.npy", batch_size=2
        )

    return read


def test_features_of_something_else_are_refused(tiny_model, examples, read, tmp_path):
    found = np.array(read(examples[:3]))
    changed = nnx.clone(tiny_model)
    changed.vision.cls[...] += 1
    turned = [examples[0], examples[2], examples[1]]
    for some, model, aspect, differs in (
        (turned, tiny_model, "square", r"data \(what the first 3 were\)"),
        (examples[:3], changed, "square", "model"),
        (examples[:3], tiny_model, "pad", "processor"),
    ):
        with pytest.raises(
            ValueError, match=f"differs in {differs}; give another path, or"
        ) as said:
            read(some, model, aspect)
        assert len(str(said.value)) < 400
    with pytest.raises(ValueError, match="contains 3, but only 2 are requested"):
        read(examples[:2])
    np.testing.assert_array_equal(read(examples[:3]), found)


def test_examples_are_added(examples, read, tmp_path):
    few = np.array(read(examples[:3]))
    more = read(examples)
    np.testing.assert_array_equal(more[:3], few)
    (tmp_path / "features.npy").unlink()
    (tmp_path / "features.json").unlink()
    np.testing.assert_allclose(more, read(examples), rtol=0, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("done", [2, 5])
def test_damaged_features_are_refused(damage, done, examples, read, tmp_path):
    class Until(list):
        def __getitem__(self, i):
            if i == done:
                raise Killed
            return super().__getitem__(i)

    with contextlib.suppress(Killed):
        read(Until(examples))
    path = tmp_path / "features.npy"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:1000])
    elif damage == "gone":
        path.unlink()
    else:
        content[200] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"features.npy is damaged .*: remove it, or start over"):
        read(examples)


def test_a_full_disk_is_one_line(examples, read, tmp_path, monkeypatch):
    """What was done before stays, and no row is half there."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = np.array(read(examples[:2]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*features.npy: No space left on device"):
            read(examples)
    found = read(examples)
    np.testing.assert_array_equal(found[:2], whole)
    assert found.any((1, 2)).all()


@pytest.mark.parametrize("family", ["idefics3", "internvl", "qwen2.5-vl"])
def test_stored_features_are_those_of_the_pictures_whatever_their_sizes(
    family, random_model, tmp_path
):
    """Pictures of more tiles than the released models cut, and of a few patches, share the rows."""
    processor = study_checkpoints.processor(family, tmp_path / "processor")
    config = processor.config
    model = random_model(config)
    sizes = (24, 120), (120, 120), (17, 40), (8, 8)
    examples = [types.SimpleNamespace(image=tiny.picture(i, *s)) for i, s in enumerate(sizes)]
    stored = features.vision_features(
        model, processor, examples, tmp_path / "features.npy", batch_size=3
    )
    assert stored.shape[1] == processor.feature_places(sizes)
    some = [3, 0]
    batch = processor([examples[i].image for i in some], ["<image>"] * 2)
    kept = features.features_batch(processor, [examples[i] for i in some], stored[some])
    for row in range(2):
        at, kept_at = (np.flatnonzero(b.tokens.kind[row] == 3) for b in (batch, kept))
        assert batch.ids[row, at].tolist() == kept.ids[row, kept_at].tolist()
        for name in ("row", "column", "tile"):
            one, two = (getattr(b.tokens, name)[row] for b in (batch, kept))
            np.testing.assert_array_equal(one[at], two[kept_at])
    read = np.asarray(features.encode_pictures(model, batch.replace(processor=None)))
    seen = features.is_patch(model, batch.replace(features=read))
    want, found = read[seen], kept.features[features.is_patch(model, kept)]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
