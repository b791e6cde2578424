"""CLIP's checkpoints: configs of old and new, and what is no CLIP in one line."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import safetensors.numpy

from mllm_jax.checkpoints import tensors
from mllm_jax.loading import clip
from tests.helpers import tiny_clip

FIELDS = {"model_type": "clip", "text_config": {}, "vision_config": {}, "projection_dim": 512}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("clip")
    tiny_clip.write(found)
    return found


@pytest.fixture
def changed(directory, tmp_path):
    """The checkpoint with other fields and tensors."""

    def make(change=lambda weights: None, **fields):
        weights = safetensors.numpy.load_file(directory / "model.safetensors")
        change(weights)
        tensors.write(weights, tmp_path / "model.safetensors")
        found = json.loads((directory / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(found))
        return tmp_path

    return make


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.CLIPConfig(), clip.from_hf(FIELDS)
    text, vision = theirs.text_config, theirs.vision_config
    assert (ours.text.vocab, ours.text.positions, ours.text.width, ours.text.end) == (
        text.vocab_size, text.max_position_embeddings, text.hidden_size, text.eos_token_id,
    )  # fmt: skip
    assert (ours.text.layers, ours.text.heads, ours.text.mlp, ours.text.act, ours.text.eps) == (
        text.num_hidden_layers, text.num_attention_heads, text.intermediate_size, text.hidden_act,
        text.layer_norm_eps,
    )  # fmt: skip
    assert (ours.vision.width, ours.vision.patch, ours.vision.run_layers) == (
        vision.hidden_size, vision.patch_size, vision.num_hidden_layers,
    )  # fmt: skip
    assert ours.width == theirs.projection_dim


def test_older_fields_win_with_their_defaults():
    """As in openai/clip-vit-large-patch14-336, whose text_config says that texts end in 2."""
    transformers = pytest.importorskip("transformers")
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    fields = FIELDS | {
        "text_config": large | {"eos_token_id": 2, "model_type": "clip_text_model"},
        "text_config_dict": large,
    }
    theirs, ours = transformers.CLIPConfig(**copy.deepcopy(fields)), clip.from_hf(fields)
    assert ours.text.end == theirs.text_config.eos_token_id == 49407
    assert ours.text.width == theirs.text_config.hidden_size == 768
    assert clip.from_hf(fields | {"text_config_dict": None}).text.end is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "llava"}, "model_type='llava' is not supported, only 'clip'"),
        ({"model_type": "clip_vision_model"}, "only 'clip'"),
        ({"text_config": {"hidden_act": "tanh"}}, "text_config.hidden_act='tanh' is not supported"),
        ({"text_config": {"eos_token_id": [1, 2]}}, r"text_config.eos_token_id=\[1, 2\]"),
        (
            {"vision_config": {"hidden_sizes": 3}},
            "vision_config.hidden_sizes .nearest: hidden_size",
        ),
    ],
)
def test_configs_that_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        clip.from_hf(FIELDS | fields)


def test_no_clip_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="/no/such/clip' is not a directory and not"):
        clip.load("/no/such/clip")
    with pytest.raises(
        FileNotFoundError, match="config.json: missing, so this is not a checkpoint"
    ):
        clip.load(tmp_path)


def test_tensors_that_do_not_fit_in_one_line(changed):
    def change(weights):
        del weights["text_projection.weight"], weights["logit_scale"]
        weights["text_model.embeddings.position_ids"] = np.arange(4)  # a buffer is no fault
        weights["text_model.extra"] = np.zeros(1, np.float32)
        weights["visual_projection.weight"] = np.zeros((3, 3), np.float32)

    with pytest.raises(ValueError) as error:
        clip.load(changed(change))
    message = str(error.value)
    assert "2 missing: text_projection.weight, logit_scale" in message
    assert "1 left over: text_model.extra" in message
    assert "visual_projection.weight is [3, 3], expected [20, 32]" in message
    assert "\n" not in message and "position_ids" not in message


def test_no_tokenizer(changed):
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor"):
        clip.load(changed())
