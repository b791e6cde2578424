"""Pooled features are the means of what a pass computes, also when the run is killed."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.data import features, pooled
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.interventions.tap import Taps
from tests.helpers import study_checkpoints, tiny

PROMPTS = ["what is shown ?", "a cat or dog ?", "what is shown in the picture ?", "a ship ?", "?"]


@pytest.fixture(scope="module")
def processor(tiny_model):
    return tiny.processor(tiny_model.config)


@pytest.fixture(scope="module")
def examples():
    shown = [types.SimpleNamespace(image=tiny.picture(i)) for i in range(5)]
    shown[3] = shown[2]  # one picture twice in a batch, which then reads it once
    return shown


@pytest.fixture(scope="module")
def found(tiny_model, processor, examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("pooled") / "deep"
    return pooled.pooled_features(
        tiny_model, processor, examples, PROMPTS, path, batch_size=2, length=32
    )


def test_they_are_means_of_the_whole_tensors(tiny_model, processor, examples, found):
    config = tiny_model.config
    shapes = {name: array.shape for name, array in found.items()}
    E, D, L = config.vision.width, config.lm.width, config.lm.layers
    assert shapes == {
        "vision": (5, E), "projector": (5, D), "lm.image": (5, L, D), "lm.last": (5, L, D),
    }  # fmt: skip
    keep = {"out": mj.keep(S.projector.out), "resid": mj.keep(S.lm.resid_post)}
    for i, (example, prompt) in enumerate(zip(examples, PROMPTS, strict=True)):
        batch = processor([example.image], [prompt])
        out = mj.run(tiny_model, batch, None, keep, logits="none")
        seen = jax.jit(lambda m, b: m.features(b, Taps()))(
            tiny_model, batch.replace(processor=None)
        )
        image, last = batch.image_token_index[0] >= 0, batch.last[0]
        resid = np.asarray(out["resid"])[:, 0]
        want = {
            "vision": np.asarray(seen)[0].mean(0),
            "projector": np.asarray(out["out"])[0].mean(0),
            "lm.image": resid[:, image].mean(1),
            "lm.last": resid[:, last],
        }
        for name, values in want.items():
            np.testing.assert_allclose(found[name][i], values, atol=1e-5, err_msg=name)


def test_features_computed_before_give_the_same(tiny_model, processor, examples, found, tmp_path):
    seen = features.vision_features(
        tiny_model, processor, examples, tmp_path / "seen.npy", batch_size=2
    )
    again = pooled.pooled_features(
        tiny_model, processor, examples, PROMPTS, tmp_path / "pooled", features=seen,
        batch_size=2, length=32,
    )  # fmt: skip
    for name, values in found.items():
        np.testing.assert_allclose(again[name], values, atol=1e-5, err_msg=name)


class Killed(BaseException):
    pass


class Until(list):
    def __getitem__(self, i):
        if i == 3:
            raise Killed
        return super().__getitem__(i)


def test_a_killed_run_continues_to_the_same_bytes(tiny_model, processor, examples, found, tmp_path):
    def read(some, prompts=PROMPTS):
        return pooled.pooled_features(
            tiny_model, processor, some, prompts, tmp_path, batch_size=2, length=32
        )

    with pytest.raises(Killed):
        read(Until(examples))
    again = read(examples)
    for name, values in found.items():
        np.testing.assert_array_equal(again[name], values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "_pooled", None)  # nothing is run for what is done
        np.testing.assert_array_equal(read(examples)["vision"], found["vision"])
    for some, prompts in (
        (examples, PROMPTS[::-1]),
        (examples, [*PROMPTS[:3], "a\nship ?", PROMPTS[4]]),
        ([*examples[:4], examples[0]], PROMPTS),
    ):
        with pytest.raises(ValueError, match="progress.json was made for .* differs in data"):
            read(some, prompts)
    with pytest.raises(ValueError, match="contains 5, but only 4 are requested"):
        read(examples[:4], PROMPTS[:4])


def test_features_that_are_given_are_part_of_what_it_is(tiny_model, processor, examples, tmp_path):
    """Also those of the last example."""

    def read(seen, path=tmp_path / "pooled"):
        return pooled.pooled_features(
            tiny_model, processor, examples[:3], PROMPTS[:3], path, features=seen, batch_size=2,
            length=32,
        )  # fmt: skip

    seen = np.array(
        features.vision_features(tiny_model, processor, examples[:3], tmp_path / "seen.npy")
    )
    first = np.array(read(seen)["lm.last"])
    seen[2] += 1
    with pytest.raises(ValueError, match="differs in data"):
        read(seen)
    assert abs(read(seen, tmp_path / "other")["lm.last"][2] - first[2]).max() > 1e-3


def test_tiles_are_weighed_by_whether_they_are_real():
    config = llava_next.LlavaNextConfig.tiny()
    each, places = config.image_tokens, config.tiles
    real = np.arange(2 * places) % places < [2] * places + [3] * places
    at = np.array([[-1, 0, each, -1], [-1, places * each, (places + 2) * each, -1],
                   [0, places * each, -1, 2 * places * each], [-1] * 4])  # fmt: skip
    tile = np.arange(2 * places) % places
    batch = types.SimpleNamespace(is_real_tile=real, image_token_index=at, tile=tile)
    values = np.full((2 * places, 1), 99.0)
    values[real] = [[1], [3], [1], [2], [6]]
    assert features.mean_over_tiles(config, batch, values)[:, 0].tolist() == [
        2,
        3,
        np.float32(13 / 5),
        0,
    ]


def test_prompts_and_examples_must_pair_up(tiny_model, processor, examples, tmp_path):
    with pytest.raises(ValueError, match="5 examples for 4 prompts"):
        pooled.pooled_features(tiny_model, processor, examples, PROMPTS[:4], tmp_path)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "idefics3"])
def test_means_around_the_projection_leave_padding_out(family, random_model, tmp_path):
    """Against each picture's own patches, one at a time, through the layers of the projector."""
    processor = study_checkpoints.processor(family, tmp_path / "processor")
    model = random_model(processor.config)
    sizes = (24, 40), (8, 16), (48, 24)
    examples = [types.SimpleNamespace(image=tiny.picture(i, *s)) for i, s in enumerate(sizes)]
    stored = features.vision_features(model, processor, examples, tmp_path / "features.npy")
    found = pooled.projected_features(model, processor, examples, stored, batch_size=2)
    for i, example in enumerate(examples):
        layout = processor.layout(example.image.size[::-1])
        if layout.grid is None:
            own = stored[i].reshape(-1, model.config.vision.feature_tokens, stored.shape[-1])
            own = own[: layout.tiles]
        else:
            own = stored[i][None, : layout.grid[0] * layout.grid[1]]
        out = model.projector(own, Taps().module("projector"))
        for name, values in {"vision": own, "projector": out}.items():
            want = np.asarray(values).reshape(-1, values.shape[-1]).mean(0)
            np.testing.assert_allclose(found[name][i], want, rtol=1e-4, atol=1e-4)
