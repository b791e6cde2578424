from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from mllm_jax import families
from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder, projectors
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.loading import load

TINY = llava.LlavaConfig.tiny()


def shapes_of(config):
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return {load.dotted(path): param.shape for path, param in nnx.to_flat_state(state)}


@pytest.mark.parametrize(
    "make",
    [
        llava.LlavaConfig.tiny,
        llava.LlavaConfig.embedded,
        llava.LlavaConfig.llava_1_5_13b,
        llava_next.LlavaNextConfig.mistral_7b,
    ],
)
def test_every_parameter_has_its_place(make):
    config = make()
    shapes = shapes_of(config)
    slots = keys.slots(shapes, families.of(config).key_table(config))
    assert {slot.path for slot in slots} == set(shapes)
    assert len({slot.key for slot in slots}) == len(slots)
    total = sum(np.prod(shape) for shape in shapes.values())
    assert sum(np.prod(slot.shape) for slot in slots) == total


def test_a_parameter_without_a_row():
    with pytest.raises(ValueError, match=r"without a row in the key tables: \['lm.gizmo'\]"):
        keys.slots({"lm.gizmo": (3,)}, decoder.table(TINY.lm))


@pytest.mark.parametrize("transform", [keys.COPY, keys.LINEAR, keys.PATCHES])
def test_transforms_are_inverse(transform):
    kernel = np.random.default_rng(0).normal(size=(4 * 4 * 3, 5))
    np.testing.assert_array_equal(transform.ours(transform.hf(kernel)), kernel)


def test_patches_equal_the_convolution():
    rng = np.random.default_rng(0)
    conv, image = rng.normal(size=(5, 3, 4, 4)), rng.normal(size=(4, 4, 3))
    expected = np.einsum("ecyx,yxc->e", conv, image)
    np.testing.assert_allclose(image.reshape(-1) @ keys.PATCHES.ours(conv), expected)


VISION = "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
LAYER = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "key, spelling",
    [
        # transformers 5 in memory
        ("model.vision_tower.encoder.layers.3.mlp.fc1.bias", VISION),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("model.language_model.layers.0.mlp.up_proj.weight", LAYER),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.image_newline", "image_newline"),
        # transformers 5 on disk
        ("vision_tower.encoder.layers.3.mlp.fc1.bias", VISION),
        (LAYER, LAYER),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        # the hub, and late transformers 4 in memory
        (VISION, VISION),
        (f"model.{VISION}", VISION),
        # the original code
        (f"model.vision_tower.{VISION}", VISION),
        ("model.layers.0.mlp.up_proj.weight", LAYER),
        ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("model.mm_projector.0.weight", "multi_modal_projector.linear_1.weight"),
        ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
        ("model.mm_projector.weight", "multi_modal_projector.linear_1.weight"),
    ],
)
def test_spellings(key, spelling):
    assert llava_keys.canonical_key(key) == spelling


def test_projectors_of_the_original_code():
    for depth, numbers in ((1, [""]), (2, ["0.", "2."]), (3, ["0.", "2.", "4."])):
        keys = [row.key for row in projectors.linears("multi_modal_projector", "projector", depth)]
        names = llava_keys.original_projector_keys(keys)
        assert set(names.values()) == {
            f"model.mm_projector.{n}{kind}" for n in numbers for kind in ("weight", "bias")
        }
        assert [llava_keys.canonical_key(names[key]) for key in keys] == keys
    with pytest.raises(ValueError, match="no name for language_projection.weight"):
        llava_keys.original_projector_keys(["language_projection.weight"])


def test_everything_wrong_in_one_error():
    slots = keys.slots(shapes_of(TINY), llava_keys.key_table(TINY))
    found = {slot.key: slot.shape for slot in slots}
    keys.check(found, slots, lambda key: llava_keys.is_unused(key, TINY))
    for layer in range(TINY.lm.layers):
        del found[f"language_model.model.layers.{layer}.mlp.up_proj.weight"]
    found["multi_modal_projector.linear_1.bias"] = (7,)
    found["language_model.model.layers.9.mlp.up_proj.weight"] = (7, 7)
    with pytest.raises(ValueError) as error:
        keys.check(found, slots, lambda key: llava_keys.is_unused(key, TINY))
    message = str(error.value)
    assert "4 missing: language_model.model.layers.{0,1,2,3}.mlp.up_proj.weight;" in message
    assert "1 left over: language_model.model.layers.9.mlp.up_proj.weight;" in message
    assert "linear_1.bias is [7], expected [32]" in message
    assert "\n" not in message


def test_unused_tensors_are_known_by_name():
    vision = "vision_tower.vision_model"
    for key in (
        f"{vision}.encoder.layers.2.mlp.fc1.weight",  # above the feature layer, -2 of 3
        f"{vision}.post_layernorm.bias",
        f"{vision}.embeddings.position_ids",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        assert llava_keys.is_unused(key, TINY), key
    for key in (
        f"{vision}.encoder.layers.1.mlp.fc1.weight",
        f"{vision}.encoder.layers.3.mlp.fc1.weight",  # there is no such layer
        "language_model.lm_head.weight",  # not tied
        "image_newline",
    ):
        assert not llava_keys.is_unused(key, TINY), key
