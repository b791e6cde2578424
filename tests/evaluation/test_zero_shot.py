"""CLIP's zero-shot says what the pipeline of transformers says."""

from __future__ import annotations

import itertools

import numpy as np
import PIL.Image
import pytest

from mllm_jax.evaluation import zero_shot
from mllm_jax.loading import clip
from tests.helpers import tiny, tiny_clip

LABELS = ("Apple scab leaf", "a spiral galaxy", "DOG", "sheet music", "x")
# Plain colours among noise: a random tower tells them apart.
COLOURS = itertools.product((0, 255), repeat=3)
PICTURES = [PIL.Image.new("RGB", (30, 20 + n), colour) for n, colour in enumerate(COLOURS)] + [
    tiny.picture(seed, 40, 30) for seed in range(3)
]


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
    for labels in (LABELS, LABELS[:4]):
        candidates = [label.lower() for label in labels]
        found = [pipe(picture, candidate_labels=candidates) for picture in PICTURES]
        want = [candidates.index(scores[0]["label"]) for scores in found]
        assert len(set(want)) > 1
        said = zero_shot.zero_shot(*loaded, iter(PICTURES), labels, batch_size=4)
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
