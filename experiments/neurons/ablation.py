"""What is lost when the neurons of a domain are switched off (MMNeuron, facts of A.2.3, A.2.4)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import study
from experiments.neurons.base import Study, off
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import deviation, domain_neurons, intervals, official
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.evaluation.metrics import datasets, lingo_judge
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score

KINDS = ("image", "question", "system")
LAST = {"last": mj.keep(S.lm.resid_post[-1])}
MEASURES = ("options", "answers")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One ablation: whose neurons of which module, on whose questions; or a random control."""

    module: str
    mask: str
    data: str
    control: int | None

    @property
    def name(self) -> str:
        kind = "selected" if self.control is None else f"random{self.control}"
        return f"{self.module}-{self.mask}-{kind}"


def check(config) -> None:
    """Refuses a measure that cannot be taken, before anything is computed."""
    if config.measure not in MEASURES:
        raise ValueError(f"config.measure={config.measure!r} is none of {', '.join(MEASURES)}")
    if config.measure == "answers":
        if not config.get("vqa"):
            raise ValueError(
                "config.measure='answers' has metrics for the data sets of paper A alone "
                "(config.vqa); other domains have measure='options'"
            )
        if "lingoqa" in (config.domains or datasets.NAMES):
            lingo_judge.load(config.judge, fallback=config.judge_fallback)


def ablate(this: Study, found: Mapping[str, SelectedNeurons]) -> tuple[dict, list, list]:
    """Accuracy and hidden-state deviation of every ablation.

    Returns:
        Accuracy by domain; a row for each cell; a row for each own mask against random neurons.
    """
    random = {
        (module, seed): domain_neurons.random_like(f, seed)
        for module, f in found.items()
        for seed in range(this.config.controls)
    }

    def masks(cell: Cell) -> dict[str, np.ndarray]:
        whose = this.names.index(cell.mask)
        every = {
            m: (found[m].mask if cell.control is None else random[m, cell.control])[whose]
            for m in cut(this, cell.module)
        }
        return {m: mask for m, mask in every.items() if mask.any()}

    baseline, rows, against = {}, [], []
    for name in this.names:
        measure = MEASURE[this.config.measure](this, name)
        cells = {cell: masks(cell) for cell in _cells(this.config, this.names, name)}
        clean, edited = measure_all(this, measure, cells)
        baseline[name] = _mean(clean["score"]) | {"chance": measure.chance, "metric": measure.name}
        mine = [
            _row(cell, clean, edited[cell], sum(int(mask.sum()) for mask in some.values()))
            for cell, some in cells.items()
        ]
        rows += mine
        against += [_against(module, name, edited) for module in this.config.modules]
    _correct([row for row in rows if row["control"] is None])
    against = [row for row in against if row]
    _correct(against)
    return baseline, rows, against


def cut(this: Study, module: str) -> tuple[str, ...]:
    """The modules that are cut when one is named: itself, some joined by +, or all."""
    named = tuple(this.shapes) if module == "all" else tuple(module.split("+"))
    if unknown := [name for name in named if name not in this.shapes]:
        raise ValueError(
            f"config.modules: the model has no neurons in {unknown[0]!r}; it has "
            f"{', '.join(this.shapes)}, all, or several joined by +"
        )
    if not this.config.compat:
        return named
    vision = "encoder" if "qformer" in this.shapes else "vision"
    released = {"lm": "lang", "vision": vision, "projector": "mmproj"}
    own = {released.get(name, name): name for name in this.shapes}
    return tuple(own[m] for m in official.ablated(released.get(n, n) for n in named))


def _cells(config, names: tuple[str, ...], data: str) -> Iterator[Cell]:
    """Every mask on a domain; controls where it meets its own mask."""
    for module in config.modules:
        for mask in names:
            yield Cell(module, mask, data, None)
        for seed in range(config.controls):
            yield Cell(module, data, data, seed)


class Options:
    """The option of the highest likelihood is the answer."""

    name = "accuracy over options"

    def __init__(self, this: Study, domain: str):
        self.this, self.domain, self.asked = this, domain, this.asked("test", domain)
        options = [question.options for _, question in self.asked.pairs]
        self.length = score.answer_length(this.processor, itertools.chain(*options))
        self.chance = float(np.mean([1 / len(some) for some in options]))

    def read(self, number: int, batch, edits: Edits) -> tuple[dict[str, np.ndarray], Any]:
        """What a batch says, and the last residual."""
        ids = score.candidate_ids(
            self.this.processor, self.asked.candidates(number), len(batch.ids), length=self.length
        )
        out = score.score_with(self.this.model, batch, ids, edits, LAST)
        rows = len(self.asked.rows(number))
        best = np.asarray(out.values)[:rows].argmax(-1)
        return {"right": best == self.asked.right(number)}, out.captures["last"]

    def score(self, said: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64[N] of all that was said."""
        return said["right"].astype(float)


class Answers:
    """What is generated is the answer, and the data set's metric judges it."""

    chance = None

    def __init__(self, this: Study, domain: str):
        self.this, self.domain, self.asked = this, domain, this.asked("test", domain)
        self.how = {"compat": this.config.compat or None}
        if domain == "lingoqa":
            self.how["judge"] = lingo_judge.load(
                this.config.judge, fallback=this.config.judge_fallback
            )
        self.name = datasets.name(domain, **self.how)

    def read(self, number: int, batch, edits: Edits) -> tuple[dict[str, np.ndarray], Any]:
        model, config = self.this.model, self.this.config
        last = mj.run(model, batch, edits, LAST, logits="none")["last"]
        sampled = {}
        if config.compat:
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            sampled = {"temperature": official.TEMPERATURE, "key": key}
        said = mj.generate(
            model, batch, edits, max_new_tokens=config.new_tokens, stop=True, **sampled
        )
        return {"said": np.array(said.text[: len(self.asked.rows(number))])}, last

    def score(self, said: Mapping[str, np.ndarray]) -> np.ndarray:
        return datasets.score(self.domain, said["said"].tolist(), self.questions, **self.how)

    @functools.cached_property
    def questions(self) -> list:
        return [question for _, question in self.asked.pairs]


MEASURE = dict(zip(MEASURES, (Options, Answers), strict=True))


def measure_all(
    this: Study, measure: Options | Answers, cells: Mapping[Cell, Mapping[str, np.ndarray]]
) -> tuple[dict[str, np.ndarray], dict[Cell, dict[str, np.ndarray]]]:
    """`score` of every question, unedited and in every cell; there also the deviation sums.

    Batch by batch, all cells on each, so that clean states are kept of one batch alone.
    """
    asked, domain = measure.asked, measure.domain

    def one(number: int) -> dict[str, np.ndarray]:
        batch, rows = asked[number], len(asked.rows(number))
        seen = study.with_features(this.model, batch, this.edits)
        # By the program that measures the edits, so that no edit is no deviation.
        said, clean = measure.read(number, seen, this.edits or Edits())
        arrays = {f"clean/{key}": value for key, value in said.items()}
        for cell, masks in tqdm.tqdm(cells.items(), desc=f"ablate, {domain}", leave=False):
            edits = (this.edits or Edits()) >> off(masks)
            said, last = measure.read(number, batch if "vision" in masks else seen, edits)
            found = said | _deviation(clean, last, batch, rows)._asdict()
            arrays |= {f"{cell.name}/{key}": value for key, value in found.items()}
        return arrays

    parts = [
        this.workdir.arrays(f"ablation/{domain}-{number}", functools.partial(one, number))
        for number in tqdm.trange(len(asked), desc=f"ablation, {domain}", leave=False)
    ]

    def joined(prefix: str) -> dict[str, np.ndarray]:
        keys = [key for key in parts[0] if key.startswith(f"{prefix}/")]
        return {
            key.removeprefix(f"{prefix}/"): np.concatenate([part[key] for part in parts], axis=-1)
            for key in keys
        }

    def scored(prefix: str) -> dict[str, np.ndarray]:
        said = joined(prefix)
        step = f"scores/{domain}/{prefix}"
        return said | this.workdir.arrays(step, lambda: {"score": measure.score(said)})

    return scored("clean"), {cell: scored(cell.name) for cell in cells}


def _deviation(clean, edited, batch, rows: int) -> deviation.Sums:
    weight = np.stack([np.asarray(getattr(tok, k).mask(batch.tokens)) for k in KINDS])
    sums = deviation.sums(clean[:rows], edited[:rows], weight[:, :rows])
    return deviation.join([sums])


def _mean(scores: np.ndarray) -> dict[str, float]:
    value, low, high = intervals.mean(scores)
    return {"accuracy": float(value), "low": float(low), "high": float(high), "n": len(scores)}


def _row(cell: Cell, clean: Mapping, edited: Mapping, neurons: int) -> dict[str, Any]:
    moved = deviation.Sums(edited["relative_l2"], edited["cosine"], edited["tokens"])
    mean = deviation.finish(moved)
    return {
        **dataclasses.asdict(cell),
        "neurons": neurons,
        "accuracy": float(edited["score"].mean()),
        **_change(clean["score"], edited["score"]),
        "deviation": {
            kind: {"relative_l2": float(mean.relative_l2[k]), "cosine": float(mean.cosine[k])}
            for k, kind in enumerate(KINDS)
            if moved.tokens[k].any()
        },
    }


def _change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Mean paired difference with its interval, and the p-value that there is none."""
    change = intervals.paired_difference(before, after)
    return {
        "difference": float(change.value), "low": float(change.low), "high": float(change.high),
        "p": intervals.sign_flip(after - before),
    }  # fmt: skip


def _against(module: str, name: str, edited: Mapping[Cell, Mapping]) -> dict[str, Any]:
    """A domain's own neurons against random ones, the mean over seeds, question by question."""
    own = edited[Cell(module, name, name, None)]["score"]
    random = [
        found["score"]
        for cell, found in edited.items()
        if cell.module == module and cell.control is not None
    ]
    if not random:
        return {}
    return {"module": module, "data": name, **_change(np.mean(random, axis=0), own)}


def _correct(rows: list[dict[str, Any]]) -> None:
    """Adds `p_holm`, the p-values corrected for the number of rows (Holm)."""
    if rows:
        adjusted = intervals.holm([row["p"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            row["p_holm"] = float(p)
