"""Settings of the projection study that mean nothing are refused before anything is trained."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments.projection import study, suppression


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("answers", "generated", "config.answers: 'generated' is not one of scores, free"),
        ("proj.start", "rndm", "config.proj.start: 'rndm' is not one of tuned, random"),
        ("e2e.aspect", "crop", "config.e2e.aspect: 'crop' is not one of pad, square"),
        ("wording", "plane", "config.wording: 'plane' is not one of paper, released, plain"),
        ("proj.recipe.warmup", 3.0, "warmup=3.0 is not a finite number from 0 to 1"),
        ("factors.changes.crop.aspect", "sqare", "config.factors.changes.crop.aspect: 'sqare'"),
    ],
)
def test_choices(config_of, field, value, says):
    config = config_of("configs/embedded_projection.py", **{field: value})
    with pytest.raises(ValueError, match=says):
        study.run(config, None)


def test_a_factor_that_changes_nothing(config_of):
    config = config_of("configs/embedded_projection.py")
    config.factors.changes["faster"] = {"rate": 1e-2}  # of the recipe
    with pytest.raises(ValueError, match="config.factors.changes.faster: .*rate"):
        study.run(config, None)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"classes": ("a", "b")}, None),
        ({"classes": ("a",)}, "classes=\\('a',\\): name two classes"),
        ({"classes": ("a", "d")}, "config.suppress.classes: 'd' is not one of a, b, c"),
        ({"classes": ("a", "c")}, "none of the test pictures of greens is 'c'"),
        ({"experts": 13}, "config.suppress.experts=13 is not a whole number from 0 to 12"),
    ],
)
def test_classes_to_suppress(setting, says):
    ids = {"train": np.array([0, 1, 2]), "test": np.array([0, 1, 1])}
    given = {"task": "greens", "classes": ("a", "b"), "experts": 12} | setting
    of = types.SimpleNamespace(
        config=types.SimpleNamespace(suppress=types.SimpleNamespace(**given)),
        model=types.SimpleNamespace(
            config=types.SimpleNamespace(lm=types.SimpleNamespace(layers=3, mlp=4))
        ),
        tasks={"greens": types.SimpleNamespace(name="greens", classes=("a", "b", "c"))},
        ids=lambda task, split: ids[split],
    )
    if says is None:
        suppression.check(of)
    else:
        with pytest.raises(ValueError, match=says):
            suppression.check(of)
