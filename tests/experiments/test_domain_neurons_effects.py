"""Effects on answers of which some cannot change."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments.domain_neurons import effects, measures
from mllm_jax.data.embedded.questions import Question
from mllm_jax.passes import score


@pytest.mark.parametrize(
    ("changeable", "says"), [(0, effects.UNDECIDED), (58, effects.UNDECIDED), (60, effects.NONE)]
)
def test_answers_that_cannot_change_show_nothing(changeable, says):
    arrays = {"score": np.ones(60), "tokens": np.zeros((1, 60))}
    rows = effects.against_controls(arrays, {"rate": [arrays, arrays]}, ("image",), changeable)
    effects.correct_effects(rows, 0.05)
    (row,) = rows
    assert row["verdict"] == says and row["n"] == changeable
    assert row["p_equal"] == pytest.approx(0.95**changeable)
    assert (row["possible"] is None) == (changeable == 0)


def test_a_single_option_is_always_right(monkeypatch):
    monkeypatch.setattr(score, "answer_length", lambda *_: 1)
    pairs = [(None, Question("category", "What?", "owl", options))
             for options in (("owl",), ("owl", "tit"), ("owl",), ("owl", "tit", "wren", "crow"))]  # fmt: skip
    study = types.SimpleNamespace(
        processor=None, questions=lambda *_: types.SimpleNamespace(pairs=pairs)
    )
    measure = measures.Options(study, "birds")
    assert (measure.changeable, measure.chance) == (2, (1 + 1 / 2 + 1 + 1 / 4) / 4)
