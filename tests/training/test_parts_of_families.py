"""Every part of every family trains, alone, and what was trained is saved and read again."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest

from mllm_jax.loading import load, save
from mllm_jax.planning import programs
from mllm_jax.training import fit, parts
from tests.helpers import random_inputs, tiny, tiny_families

# Together every part; those of the LM that train its weights twice cannot be one.
PARTS = ("projector+lm", "lora+neurons")
QUICK = (("paligemma", "projector+lm"),)
# Their parts are those of other families.
SIBLINGS = ("llava_next", "siglip_qwen2", "qwen2_5_vl", "qwen2_vl", "smolvlm", "llava_pixtral")


def cases():
    for name in tiny_families.CONFIGS:
        for part in PARTS:
            marks = [pytest.mark.slow] + [pytest.mark.long] * (name in SIBLINGS)
            yield pytest.param(name, part, marks=[] if (name, part) in QUICK else marks)


LORA = parts.Lora(rank=2, matrices=r"lm\.layers\.attn\..*\.kernel")
MATRICES = {"up": "lm.layers.mlp.up.kernel", "down": "lm.layers.mlp.down.kernel"}


@functools.cache
def made(name: str):
    """(model, batch) of a family."""
    model = random_inputs.random_model(tiny_families.CONFIGS[name])
    pictures = [tiny.picture(0, 40, 24), tiny.picture(1)] if model.config.tiles else None
    batch = tiny_families.processor(name)(
        pictures, ["what is shown ?", "which kind ?"], answers=["a cat", "red"]
    )
    return model, batch


def weights(model) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {parts.weight_name(path): np.asarray(leaf) for path, leaf in leaves}


def neurons(model) -> dict[str, np.ndarray]:
    shape = model.config.lm.layers, model.config.lm.mlp
    rng = np.random.default_rng(0)
    return {side: rng.random(shape) < 0.5 for side in MATRICES}


def expected(part: str, names) -> set[str]:
    """The weights that a part changes."""
    if part == "neurons":
        return set(MATRICES.values())
    if part == "lora":
        return {name for name in names if re.fullmatch(LORA.matrices, name)}
    return {name for name in names if name.startswith(f"{part}.")}


@pytest.mark.parametrize(("name", "part"), list(cases()))
def test_a_part_alone_trains_and_is_saved(name, part, tmp_path):
    model, batch = made(name)
    if "projector" in part and model.config.projector is None:
        part = part.removeprefix("projector+")
    masks = neurons(model) if "neurons" in part else None
    recipe = fit.Recipe(part=part, lora=LORA, rate=3e-3, warmup=0, clip=0)
    after, curve = fit.fit(model, [batch] * 3, recipe, neurons=masks)
    assert curve[2] < curve[0]
    before, found = weights(model), weights(after)
    # Adam moves a weight wherever its gradient is not zero, however small that is.
    moved = {name for name, array in before.items() if (array != found[name]).any()}
    assert moved == set().union(*(expected(one, before) for one in part.split("+")))
    for side, mask in (masks or {}).items():
        own = before[MATRICES[side]] != found[MATRICES[side]]
        np.testing.assert_array_equal((own if side == "down" else own.swapaxes(1, 2)).any(-1), mask)
    assert_saved(after, tmp_path / "saved")


def assert_saved(model, directory) -> None:
    """Read again, all weights are the same; layers of the tower that are not run are left out."""
    back = weights(load.read_model(save.save_hf(model, None, directory)))
    own = weights(model)
    assert back.keys() == own.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, own[name][: len(array)], err_msg=name)


def test_a_part_that_a_family_lacks_is_refused():
    model = programs.abstract_model(tiny_families.CONFIGS["gemma3_text"], np.float32)
    with pytest.raises(ValueError, match='part="projector": this model has no projector'):
        parts.partition(model, "projector")
