"""Measure the effects of ablating the neurons of a domain (MMNeuron)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from experiments.domain_neurons import effects
from experiments.domain_neurons.context import Study
from experiments.domain_neurons.controls import KINDS as CONTROLS
from experiments.domain_neurons.controls import Controls, Kind
from experiments.domain_neurons.measures import MEASURES, Measure, check_measure
from experiments.modules import ablate_masks
from mllm_jax import tokens as tok
from mllm_jax.analysis import deviation, intervals, official
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.batch import Batch
from mllm_jax.data.features import read_pictures

KINDS = ("image", "question", "system")
SHOWN = 200  # the largest number of changed answers of a cell in results.json


@dataclasses.dataclass(frozen=True)
class Cell:
    """One ablation.

    Attributes:
      module: The module whose neurons are ablated, several joined by +, "all", or "none".
      mask: The domain whose neurons are ablated.
      data: The domain that is tested.
      control: The kind of control that is ablated in their place; None for none.
      draw: The number of its draw; None for none.
    """

    module: str
    mask: str
    data: str
    control: Kind | None = None
    draw: int | None = None

    @property
    def name(self) -> str:
        """The name of the ablation among those of its data."""
        if self.module == "none":
            return "clean"
        kind = "selected" if self.control is None else f"{self.control}{self.draw}"
        return f"{self.module}-{self.mask}-{kind}"


CLEAN = Cell("none", "", "")  # nothing is ablated


class Ablations(NamedTuple):
    """The results of all ablations, as plain JSON values.

    Attributes:
      baseline: The accuracy of the model without ablation, by domain.
      ablation: A row for each cell.
      effects: A row for each domain's own neurons against a kind of control, by module.
      deviation_layers: The layers of the language model after which states are compared.
      deviation_by_layer: A row for each module, domain and kind of control, see
        `effects.by_layer`.
      power: A row for each family of tests of the cells, by domain.
      questions: The id of the picture, the question and the right answer, by domain.
    """

    baseline: dict[str, dict[str, Any]]
    ablation: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    deviation_layers: list[int]
    deviation_by_layer: list[dict[str, Any]]
    power: list[dict[str, Any]]
    questions: dict[str, list[dict[str, str]]]


Masks = Mapping[str, np.ndarray]  # bool[L, F] by module


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse a measure that is not defined, before anything is computed."""
    check_measure(config)


def ablate(study: Study, neurons: Mapping[str, SelectedNeurons], controls: Controls) -> Ablations:
    """Measure the accuracy and the deviation of hidden states of every ablation."""

    def masks_of(cell: Cell) -> dict[str, np.ndarray]:
        domain = study.names.index(cell.mask)
        masks = {
            m: neurons[m].mask[domain]
            if cell.control is None
            else controls.masks[m, cell.control][cell.draw, domain]
            for m in ablated_modules(study, cell.module)
        }
        return {m: mask for m, mask in masks.items() if mask.any()}

    baseline, rows, against, layers = {}, [], [], []
    questions: dict[str, list[dict[str, str]]] = {}
    for name in study.names:
        measure = MEASURES[study.config.measure](study, name)
        cells = {cell: masks_of(cell) for cell in _cells(study, controls, name)}
        clean, edited = measure_all(study, measure, cells)
        questions[name] = [
            {"id": example.id, "question": question.prompt, "answer": question.answer}
            for example, question in measure.questions.pairs
        ]
        count = measure.changeable
        baseline[name] = _mean(clean["score"]) | {
            "n": count, "chance": measure.chance, "metric": measure.name
        }  # fmt: skip
        rows += [
            _row(cell, clean, edited[cell], sum(int(mask.sum()) for mask in masks.values()))
            for cell, masks in cells.items()
        ]
        for module in study.config.modules:
            own, draws = edited[Cell(module, name, name)], _draws(module, edited)
            named = {"module": module, "data": name}
            against += [named | row for row in effects.against_controls(own, draws, KINDS, count)]
            layers += [named | row for row in effects.by_layer(own, draws, KINDS)]
    sizes = {name: score["n"] for name, score in baseline.items()}
    power = effects.correct_cells([row for row in rows if row["control"] is None], sizes)
    effects.correct_effects(against, study.config.margin)
    return Ablations(baseline, rows, against, study.deviation_layers, layers, power, questions)


def ablated_modules(study: Study, module: str) -> tuple[str, ...]:
    """Return the modules that an entry of `config.modules` names.

    Args:
      study: The study.
      module: A module, several joined by +, or "all". With `compat="official"`, the released
        code decides which modules it ablates under this name.

    Raises:
      ValueError: The model lacks a module.
    """
    named = tuple(study.shapes) if module == "all" else tuple(module.split("+"))
    if unknown := [name for name in named if name not in study.shapes]:
        raise ValueError(
            f"config.modules: the model has no neurons in {unknown[0]!r}; it has "
            f"{', '.join(study.shapes)}, all, or several joined by +"
        )
    if not study.config.compat:
        return named
    vision = "encoder" if "qformer" in study.shapes else "vision"
    released = {"lm": "lang", "vision": vision, "projector": "mmproj"}
    ours = {released.get(name, name): name for name in study.shapes}
    return tuple(ours[m] for m in official.ablated(released.get(n, n) for n in named))


def _cells(study: Study, controls: Controls, data: str) -> Iterator[Cell]:
    """Yield the ablations tested on a domain: every mask, and the controls of its own mask."""
    for module in study.config.modules:
        for mask in study.names:
            yield Cell(module, mask, data)
        for kind, draws in controls.draws.items():
            for draw in range(draws):
                yield Cell(module, data, data, kind, draw)


def measure_all(
    study: Study, measure: Measure, cells: Mapping[Cell, Masks]
) -> tuple[dict[str, np.ndarray], dict[Cell, dict[str, np.ndarray]]]:
    """Measure all cells on one domain, batch by batch, to keep the clean states of one batch only.

    Args:
      study: The study.
      measure: The measure on the questions of the domain.
      cells: The masks of each cell.

    Returns:
      The arrays of the model without ablation, and those of each cell: `score` of every question,
      and in a cell also the deviation sums.
    """
    questions, domain = measure.questions, measure.domain
    by_vision = _by_vision_mask({CLEAN: {}, **cells})

    def measure_batch(number: int) -> dict[str, np.ndarray]:
        batch, rows = questions[number], len(questions.rows(number))
        arrays: dict[str, np.ndarray] = {}
        clean = None
        bar = tqdm.tqdm(total=len(cells) + 1, desc=f"ablate, {domain}", leave=False)
        for vision, group in by_vision:
            seen, edits = read_pictures(study.model, batch, study.edits >> ablate_masks(vision))
            for cell, masks in group.items():
                response, hidden = measure.respond(number, seen, edits >> ablate_masks(masks))
                clean = hidden if clean is None else clean
                if cell != CLEAN:
                    response |= _deviation(clean, hidden, batch, rows)._asdict()
                arrays |= {f"{cell.name}/{key}": value for key, value in response.items()}
                bar.update()
        return arrays

    parts = [
        study.workdir.arrays(
            f"ablation/{domain}-{number}", functools.partial(measure_batch, number)
        )
        for number in tqdm.trange(len(questions), desc=f"ablation, {domain}", leave=False)
    ]

    def join(prefix: str) -> dict[str, np.ndarray]:
        keys = [key for key in parts[0] if key.startswith(f"{prefix}/")]
        return {
            key.removeprefix(f"{prefix}/"): np.concatenate([part[key] for part in parts], axis=-1)
            for key in keys
        }

    def score(prefix: str) -> dict[str, np.ndarray]:
        responses = join(prefix)
        step = f"scores/{domain}/{prefix}"
        return responses | study.workdir.arrays(step, lambda: {"score": measure.score(responses)})

    return score(CLEAN.name), {cell: score(cell.name) for cell in cells}


def _by_vision_mask(cells: Mapping[Cell, Masks]) -> list[tuple[Masks, dict[Cell, Masks]]]:
    """Return each mask of the vision tower, with the cells that have it and their other masks.

    The tower runs once for all cells of a mask. Cells without a mask of the tower come first.
    """
    groups: dict[bytes, tuple[Masks, dict[Cell, Masks]]] = {}
    for cell, masks in cells.items():
        vision = {module: mask for module, mask in masks.items() if module == "vision"}
        others = {module: mask for module, mask in masks.items() if module != "vision"}
        key = b"".join(mask.tobytes() for mask in vision.values())
        groups.setdefault(key, (vision, {}))[1][cell] = others
    return list(groups.values())


def _deviation(clean: jax.Array, edited: jax.Array, batch: Batch, rows: int) -> deviation.Sums:
    weight = np.stack([np.asarray(getattr(tok, kind).mask(batch.tokens)) for kind in KINDS])
    sums = _sums(clean[:, :rows], edited[:, :rows], weight[:, :rows])
    return deviation.join([sums])


_sums = jax.jit(deviation.sums)  # in one pass over the states of all layers


def _mean(scores: np.ndarray) -> dict[str, Any]:
    value, low, high = intervals.mean(scores)
    return {"accuracy": float(value), "low": float(low), "high": float(high)}


def _row(
    cell: Cell, clean: Mapping[str, np.ndarray], edited: Mapping[str, np.ndarray], neurons: int
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(cell),
        "neurons": neurons,
        "accuracy": float(edited["score"].mean()),
        **effects.change(clean["score"], edited["score"]),
        **(_changed(clean, edited) if cell.control is None else {}),
        "deviation": _deviation_row(edited),
    }


def _deviation_row(edited: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the mean deviations after the last layer, per token by kind, with their intervals."""
    tokens = edited["tokens"]
    counted = [k for k in range(len(KINDS)) if tokens[k].any()]
    if not counted:
        return {}
    sums = np.stack([edited[measure][-1, counted].T for measure in effects.DEVIATIONS], axis=-1)
    found = intervals.ratio(sums, tokens[counted].T[..., None])
    return {
        KINDS[k]: {
            f"{measure}{end}": float(values[place, m])
            for m, measure in enumerate(effects.DEVIATIONS)
            for end, values in (("", found.value), ("_low", found.low), ("_high", found.high))
        }
        for place, k in enumerate(counted)
    }


def _changed(clean: Mapping[str, np.ndarray], edited: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return how many answers an ablation changed, and the first of them, before and after."""
    numbers = np.flatnonzero(clean["texts"] != edited["texts"])
    return {
        "changes": len(numbers),
        "changed": [
            {"question": int(i), "before": str(clean["texts"][i]), "after": str(edited["texts"][i]),
             "scores": [float(clean["score"][i]), float(edited["score"][i])]}
            for i in numbers[:SHOWN]
        ],
    }  # fmt: skip


def _draws(module: str, edited: Mapping[Cell, effects.Arrays]) -> dict[Kind, list[effects.Arrays]]:
    """Return the arrays of the draws of a module by kind of control."""
    return {
        kind: [
            arrays
            for cell, arrays in edited.items()
            if cell.module == module and cell.control == kind
        ]
        for kind in CONTROLS
    }
