"""Ablate single neurons, and measure the change in the likelihood of right answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from experiments.domain_neurons import selection
from experiments.domain_neurons.context import Study
from mllm_jax.batch import Batch
from mllm_jax.typing import Int

Neuron = Mapping[str, Any]  # a row of the evidence


def measure(study: Study, neurons: Sequence[Neuron]) -> list[dict[str, float]]:
    """Measure the effects of the neurons of largest estimated effect in their own domains.

    Args:
      study: The study. `evidence_exact` of its config is the number of neurons of each module and
        domain that are ablated, one at a time.
      neurons: The rows of the evidence; without estimates, `effects`, the first are taken.

    Returns:
      For each neuron, by domain in which it was ablated, the change of the log-likelihood of right
      answers: the mean over the questions of the estimates.
    """
    chosen = list(_choose(study, neurons))
    if not chosen:
        return [{} for _ in neurons]

    def make() -> list[dict[str, float]]:
        exact: list[dict[str, float]] = [{} for _ in neurons]
        answers = {
            name: selection.right_answers(study, study.evidence(name, "released"), 0)
            for name in study.names
        }
        clean = {name: _likelihood(study, *of) for name, of in answers.items()}
        for number, name in tqdm.tqdm(chosen, desc="single neurons", leave=False):
            off = _likelihood(study, *answers[name], neurons[number])
            exact[number][name] = off - clean[name]
        return exact

    return study.workdir.json("single-effects", make)


def _choose(study: Study, neurons: Sequence[Neuron]) -> Iterator[tuple[int, str]]:
    """Yield the number of each neuron that is ablated, and the domain that is tested."""
    for name in study.names:
        for module in study.shapes:
            own = [
                number
                for number, row in enumerate(neurons)
                if row["module"] == module and name in row["domains"]
            ]
            own.sort(key=lambda number: -abs(neurons[number]["effects"].get(name, 0.0)))
            yield from ((number, name) for number in own[: study.config.evidence_exact])


def _likelihood(
    study: Study, batch: Batch, ids: Int[np.ndarray, "B 1 A"], off: Neuron | None = None
) -> float:
    """Return the mean log-likelihood of right answers, nats per question, with a neuron ablated."""
    gates = selection.open_gates(study)  # of all modules: one compiled program for every neuron
    if off is not None:
        gates[off["module"]][off["layer"], off["index"]] = 0
    found = selection.score_gated(gates, study.model, batch, ids, study.edits)
    rows = int((ids[:, 0, 0] >= 0).sum())
    return float(np.asarray(found, np.float64)[:rows, 0].mean())
