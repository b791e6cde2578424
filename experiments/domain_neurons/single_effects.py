"""Switch off single neurons, and measure what that does to the likelihood of right answers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

import mllm_jax as mj
from experiments.domain_neurons.context import Study
from experiments.modules import MODULES
from mllm_jax.passes import score

Neuron = Mapping[str, Any]  # a row of the evidence


def measure(study: Study, neurons: Sequence[Neuron]) -> list[dict[str, float]]:
    """Measure the effects of the neurons of largest estimated effect in their own domains.

    Args:
        study: the study. `evidence_exact` of its config is the number of neurons of each module and
            domain that are switched off, one at a time.
        neurons: the rows of the evidence; without estimates, `effects`, the first are taken.

    Returns:
        For each neuron the change of the log likelihood of right answers, mean over the questions
        of which the estimates are, by domain: those domains alone in which it was switched off.
    """
    chosen = list(_choose(study, neurons))
    if not chosen:
        return [{} for _ in neurons]

    def make() -> list[dict[str, float]]:
        exact: list[dict[str, float]] = [{} for _ in neurons]
        clean = {name: _likelihood(study, name) for name in study.names}
        for number, name in tqdm.tqdm(chosen, desc="single neurons", leave=False):
            exact[number][name] = _likelihood(study, name, neurons[number]) - clean[name]
        return exact

    return study.workdir.json("single-effects", make)


def _choose(study: Study, neurons: Sequence[Neuron]) -> Iterator[tuple[int, str]]:
    """Yield the number of each neuron that is switched off, and the domain that is tested."""
    for name in study.names:
        for module in study.shapes:
            own = [
                number
                for number, row in enumerate(neurons)
                if row["module"] == module and name in row["domains"]
            ]
            own.sort(key=lambda number: -abs(neurons[number]["effects"].get(name, 0.0)))
            yield from ((number, name) for number in own[: study.config.evidence_exact])


def _likelihood(study: Study, name: str, off: Neuron | None = None) -> float:
    """Return the mean log likelihood of right answers, nats a question, with a neuron off."""
    gates = {module: np.ones(shape, np.float32) for module, shape in study.shapes.items()}
    if off is not None:
        gates[off["module"]][off["layer"], off["index"]] = 0
    questions = study.evidence(name, "released")
    right = [[question.answer] for _, question in questions.rows(0)]
    batch = questions[0].replace(processor=None)
    ids = score.candidate_ids(study.processor, right, len(batch.ids))
    # Gates of all modules, of which one is closed: every neuron is the same program.
    scaled = (mj.scale(MODULES[module], gate) for module, gate in gates.items())
    edits = functools.reduce(operator.rshift, scaled, study.edits)
    found = mj.score(study.model, batch, ids, edits)
    return float(np.asarray(found, np.float64)[: len(right), 0].mean())
