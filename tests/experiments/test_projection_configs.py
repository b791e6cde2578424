"""The configs of the projection study: fields, hyper-parameters of the paper, one epoch of steps."""

from __future__ import annotations

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.data import classification
from mllm_jax.families.llava import model as llava
from mllm_jax.planning import programs
from mllm_jax.training import fit, losses, parts

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def get_config(file: str, *which: str):
    return runpy.run_path(str(CONFIGS / file))["get_config"](*which)


def fields(config) -> set[str]:
    """Dotted names; what changes a factor is a value."""
    flat = set()
    for name, value in config.items():
        nested = hasattr(value, "items") and name != "changes"
        flat |= {f"{name}.{inner}" for inner in fields(value)} if nested else {name}
    return flat


@pytest.mark.parametrize("choices", ["", "-official"])
@pytest.mark.parametrize("name", classification.NAMES)
def test_hyper_parameters_of_the_paper(name, choices):
    config = get_config("projection_llava.py", name + choices)
    proj, e2e, official = config.proj, config.e2e, bool(choices)
    assert config.tasks == (name,) and config.choices in classification.SPELLINGS
    assert (proj.batch_size, e2e.batch_size, e2e.recipe.rate) == (64, 32, 2e-5)
    for setting in (proj, e2e):
        recipe = setting.recipe
        assert (recipe.warmup, recipe.weight_decay, recipe.accumulate) == (0.03, 0.0, 1)
    assert (proj.recipe.part, e2e.recipe.part) == ("projector", "projector+lm")
    assert (proj.wording == "plain") == (proj.aspect == "square") == (not proj.end) == official
    assert (proj.recipe.rate == 1e-3) == official
    assert e2e.end and e2e.aspect == "pad" and e2e.wording == config.wording != "plain"


def test_steps_are_an_epoch():
    steps = {
        name: (config.proj.steps, config.e2e.steps)
        for name in classification.NAMES
        for config in [get_config("projection_llava.py", name)]
    }
    assert steps["dtd"] == (30, 59)  # of 1,880 pictures
    assert steps["plantdoc"] == (33, 66) and steps["dermnet"] == (219, 438)


@pytest.mark.parametrize("variant, numbers", [("proj", 20_979_712), ("e2e", 6_759_919_616)])
def test_a_step_of_7b_gives_back_what_trains(variant, numbers):
    """By shapes alone, at the batch of the paper."""
    setting = get_config("projection_llava.py", "dtd")[variant]
    recipe = fit.Recipe.of(setting.recipe.to_dict())
    network = programs.abstract_model(llava.LlavaConfig.llava_1_5_7b(), jnp.bfloat16)
    size = programs.Size(rows=setting.batch_size)
    planned = programs.build(
        "projection", network, programs.abstract_batch(network.config, size), None, None, size
    )
    (batch,) = [tree for name, tree in planned.args if name == "batch"]
    merge, trained, frozen = parts.partition(network, recipe.part)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == numbers
    state = jax.eval_shape(recipe.optimiser(setting.steps).init, trained)
    step = functools.partial(
        fit.update, merge=merge, recipe=recipe, steps=setting.steps, loss=losses.answer_nll,
        places=(),
    )  # fmt: skip
    *after, loss = jax.eval_shape(step, trained, state, frozen, batch)
    forms = [
        [(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (after, (trained, state))
    ]
    assert forms[0] == forms[1] and loss.shape == ()


def test_an_unknown_name_is_refused():
    for which in ("imagenet", "dtd-my"):
        with pytest.raises(ValueError, match=f"{which} is not one of plantdoc, dtd"):
            get_config("projection_llava.py", which)


def test_fields_are_those_of_the_embedded_study():
    own = fields(get_config("projection_llava.py"))
    assert own - {"choices"} == fields(get_config("embedded_projection.py")) - {"choices"}
