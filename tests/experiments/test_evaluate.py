"""The evaluation of a tiny model: options by their scores, or generated text."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mllm_jax as mj
from experiments import examples
from experiments.evaluate import study as evaluate
from experiments.evaluate.study import MEASURES
from mllm_jax import sites as S
from mllm_jax.data import batching
from tests.helpers import in_process, random_inputs, studies, tiny

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LABELS = ("not", "tree", "which", "yes")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    images = (tiny.picture(i) for i in range(32))
    return in_process.write_questions(tmp_path_factory.mktemp("pictures"), images, LABELS)


@pytest.fixture(scope="module")
def loaded(tiny_model, tiny_config):
    return tiny_model, tiny.processor(tiny_config)


@pytest.fixture
def config(config_of, pictures):
    """Makes the config with some fields changed."""

    def make(**fields):
        common = {"paths": (pictures,), "model": "tiny", "styles": ("category",), "batch_size": 4}
        return config_of(studies.EVALUATE, test_per_domain=5, **common | fields)

    return make


@pytest.fixture
def run(loaded, tmp_path):
    """Runs the evaluation under edits, with a capture; its folder."""
    captures = {"fire": mj.stats(S.lm.mlp.act)}

    def run(config, edits=None):
        return in_process.run(evaluate, config, tmp_path / config.measure, loaded, edits, captures)

    return run


@pytest.mark.parametrize("named", [True, False])
def test_generated_answers_are_right_if_they_name_the_option(named, run, config, loaded):
    """The logits of a word are raised, so that the model says nothing else."""
    (domain,) = examples.domains_of(config(), "test").values()  # longer than the study reads
    expected = [question.answer for _, question in batching.ask(list(domain), ("category",))[:5]]
    word = expected[0] if named else "is"
    raised = np.zeros(random_inputs.TINY.lm.vocab, np.float32)
    raised[loaded[1].tokenizer.encode(word, add_special_tokens=False)[-1]] = 1e4
    workdir = run(config(measure="answers", new_tokens=3), mj.add(S.logits, raised))
    row = json.loads((workdir / "results.json").read_text())["accuracy"]["noise"]["category"]
    assert row["n"] == 5 and (row["accuracy"] > 0) == named
    assert row["accuracy"] == pytest.approx(np.mean([answer == word for answer in expected]))


def test_captures_of_generated_answers_are_also_of_their_tokens(run, config):
    """All answers have three tokens, the last of which is not read."""
    prompts, answered = (tokens(run(config(measure=name, new_tokens=3))) for name in MEASURES)
    assert (answered == prompts + 5 * 2).all()


def tokens(workdir) -> np.ndarray:
    with np.load(workdir / "captures" / "noise-category.npz") as captures:
        return captures["fire/tokens"]


def test_an_unknown_measure_is_refused(run, config):
    with pytest.raises(ValueError, match=r"config.measure: 'text' is not one of options, answers"):
        run(config(measure="text"))
