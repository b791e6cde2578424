"""Metrics say in one line what they cannot score."""

from __future__ import annotations

import types

import numpy as np
import pytest

from mllm_jax.evaluation.metrics import classification, datasets, lingo_judge, official, text, vqa

NAN = float("nan")
BROKEN = lingo_judge.Judge("a judge", lambda *row: NAN)
QUESTION = types.SimpleNamespace(answers=["a"], answer="a", id="1", text="?")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text.anls(NAN, ["a"]), r"prediction\[0\] is nan, not a string"),
        (lambda: text.anls(None, ["a"]), r"prediction\[0\] is None, not a string"),
        (lambda: text.anls("a", []), "ANLS needs at least one answer, got none"),
        (lambda: text.anls("a", "abc"), "answers must be a list of strings, got str"),
        (lambda: text.anls("a", ["a", NAN]), r"answers\[1\] is nan, not a string"),
        (lambda: text.anls("a", ["b"], threshold=NAN), "threshold=nan lies outside"),
        (lambda: text.option_letter(NAN), r"prediction\[0\] is nan"),
        (lambda: text.option_letter("A", "a lung"), "options must be a list of strings"),
        (lambda: text.exact_match("a", NAN), r"texts\[1\] is nan"),
        (lambda: text.by_type([1.0, NAN], ["a", "b"]), r"values\[1\] is nan"),
        (lambda: text.by_type([], []), "0 values for 0 types"),
        (lambda: text.by_type([1.0], ["a", "b"]), "1 values for 2 types"),
        (lambda: vqa.accuracy(NAN, ["a"]), r"prediction\[0\] is nan"),
        (lambda: vqa.accuracy("two", "two"), "answers must be a list of strings"),
        (lambda: vqa.accuracy("two", []), "needs people's answers, got none"),
        (lambda: vqa.accuracy("two", [None]), r"answers\[0\] is None"),
        (lambda: official.anls(NAN, ["a"]), r"prediction\[0\] is nan"),
        (lambda: official.option_letter(NAN, "A"), r"texts\[0\] is nan"),
        (lambda: official.exact_match("a", None), r"texts\[1\] is None"),
        (lambda: official.vqa("a", ["a", "b"], ["yes"]), "1 confidences for 2 answers"),
        (lambda: official.vqa("a", [], []), "needs people's answers, got none"),
        (lambda: official.lingo_judge(BROKEN, ["1"], ["?"], ["a"], []), "0 predictions for 1 ids"),
        (lambda: official.lingo_judge(BROKEN, ["1"], ["?"], ["a"], ["a", "b"]),
         "2 predictions for 1 ids"),
        (lambda: official.lingo_judge(BROKEN, ["1"], ["?"], ["a"], ["a"]), "a judge gave nan"),
        (lambda: official.lingo_judge(BROKEN, [], [], [], []), "no question to judge"),
        (lambda: BROKEN.right("?", ["a"], "a"), "a judge gave nan for question"),
        (lambda: datasets.score("docvqa", [NAN], [QUESTION]), r"predictions\[0\] is nan"),
        (lambda: datasets.score("docvqa", "a", [QUESTION]), "predictions must be a list of strings"),
        (lambda: datasets.score("docvqa", [], []), "0 predictions for 0 questions"),
        (lambda: datasets.score("docvqa", ["a", "b"], [QUESTION]), "2 predictions for 1 questions"),
        (lambda: classification.confusion([0, NAN], [0, 1], 2), "truth must be class ids"),
        (lambda: classification.confusion([0, 1], [0.0, NAN], 2), "predicted must be class ids"),
        (lambda: classification.confusion([], [], 2), "both need one per picture"),
        (lambda: classification.confusion([0], [0, 1], 2), "both need one per picture"),
        (lambda: classification.accuracy(np.zeros((2, 3), int)), "not all 0"),
        (lambda: classification.macro_f1(np.zeros((2, 3), int)), "not all 0"),
        (lambda: classification.f1(np.ones((2, 2), int)), r"counts must be \[C, C \+ 1\]"),
        (lambda: classification.recall(np.full((2, 3), NAN)), "counts must be integers of 0 or more"),
        (lambda: classification.table(np.ones((2, 3), int), ["a"]), "1 names for 2 classes"),
    ],
)  # fmt: skip
def test_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
