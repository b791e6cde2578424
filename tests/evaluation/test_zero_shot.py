"""CLIP's zero-shot says what the pipeline of transformers says."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.checkpoints import clip
from mllm_jax.evaluation import zero_shot
from tests import tiny, tiny_clip

LABELS = ("Apple scab leaf", "a spiral galaxy", "DOG", "sheet music", "x")
PICTURES = [tiny.picture(seed, 20 + seed, 30) for seed in range(11)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("clip")
    tiny_clip.write(found)
    return found


@pytest.fixture(scope="module")
def loaded(directory):
    return clip.load(directory)


def test_classes_are_those_of_the_pipeline(loaded, directory):
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline(
        "zero-shot-image-classification", model=str(directory),
        image_processor=transformers.CLIPImageProcessorPil.from_pretrained(directory),
    )  # fmt: skip
    candidates = [label.lower() for label in LABELS]
    found = [pipe(picture, candidate_labels=candidates) for picture in PICTURES]
    want = [candidates.index(scores[0]["label"]) for scores in found]
    assert len(set(want)) > 1
    said = zero_shot.zero_shot(*loaded, iter(PICTURES), LABELS, batch_size=4)
    assert said.dtype == np.int32
    np.testing.assert_array_equal(said, want)


def test_paths_and_no_pictures(loaded, tmp_path):
    path = tmp_path / "picture.png"
    PICTURES[0].save(path)
    said = [zero_shot.zero_shot(*loaded, [p], LABELS) for p in (path, PICTURES[0])]
    np.testing.assert_array_equal(*said)
    assert len(zero_shot.zero_shot(*loaded, [], LABELS)) == 0


def test_what_cannot_be_read_is_told(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match="no labels to choose from"):
        zero_shot.zero_shot(model, processor, PICTURES, ())
    long = "a" * tiny_clip.POSITIONS
    with pytest.raises(ValueError, match=f"{long}.' has .* more than this CLIP's 48"):
        zero_shot.zero_shot(model, processor, PICTURES, (long,))
    other = type(processor)(lambda texts: {"input_ids": [[1, 2]]}, None, processor.config)
    with pytest.raises(ValueError, match=r"the tokens \[1, 2\] of 'a' do not fit a CLIP of 514"):
        other.texts(["a"])
