"""The tables and claims of the projection study (Verma et al. 2024), from the answers of each run.

A variant (Original, FT-Proj, FT-E2E, or a baseline) says of each test picture which class it is, in
R runs with different seeds: int[R, N], -1 where an answer named no class. So do the probes.

    task = Task(truth, classes, said={"Original": ..., "FT-Proj": ..., "FT-E2E": ...},
                probed={"paper": {"before": ..., "Original": ..., "FT-Proj": ..., "FT-E2E": ...}})
    table(task.truth, task.said, classes, over="Original")      # rows of Table 1
    claims({"objects": task, ...})                              # each claim with its verdict

Intervals are percentile bootstraps that draw pictures and runs anew; differences are paired, by
picture and by run. TABLE_1, TABLE_2 and TABLE_3 are what the paper found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mllm_jax.analysis import checks, intervals

CLIP, ORIGINAL, PROJ, E2E, BEFORE = "CLIP zero-shot", "Original", "FT-Proj", "FT-E2E", "before"

# Verma et al. 2024, Tables 1 to 3, by task: macro-F1 and accuracy, of probes after the projection
# macro-F1 alone. Mean of 5 runs (Table 1).
TASKS = ("Agriculture", "Textures", "Dermatology", "Humanitarian")
TABLE_1 = {
    "Random": ((0.0309, 0.0339), (0.0214, 0.0218), (0.0451, 0.0483), (0.2425, 0.2664)),
    CLIP: ((0.4165, 0.4492), (0.4582, 0.4984), (0.1783, 0.2401), (0.4139, 0.4718)),
    ORIGINAL: ((0.1064, 0.1255), (0.1882, 0.2138), (0.0658, 0.0672), (0.5169, 0.5678)),
    PROJ: ((0.2221, 0.2478), (0.4505, 0.4654), (0.2932, 0.3403), (0.6227, 0.7151)),
    E2E: ((0.5984, 0.6525), (0.7446, 0.7496), (0.4947, 0.5464), (0.7950, 0.8554)),
}
TABLE_2 = {
    ORIGINAL: (0.5701, 0.6401, 0.3105, 0.7498),
    PROJ: (0.4134, 0.4736, 0.2182, 0.6025),
    E2E: (0.5346, 0.6212, 0.2525, 0.7238),
}
TABLE_3 = ((0.6991, 0.7118), (0.7644, 0.7638), (0.6046, 0.6492), (0.7506, 0.8238))


@dataclasses.dataclass(frozen=True)
class Task:
    """What was found of one task.

    Attributes:
        truth: int[N], the classes of the test pictures.
        classes: C.
        said: {variant: int[R, N]}, the model's answers.
        probed: {probe: {variant: int[R, N]}}, what a probe reads after the projection; under
            "before", what it reads before. The paper's probes are named "paper".
    """

    truth: np.ndarray
    classes: int
    said: Mapping[str, np.ndarray]
    probed: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def answers(self, of: str, variant: str) -> np.ndarray | None:
        """int[R, N], of the model ("model") or of a probe by its name; None if not measured."""
        return (self.said if of == "model" else self.probed.get(of, {})).get(variant)


class Sample(NamedTuple):
    """A metric of R runs, and what it would be on other pictures and with other seeds.

    Attributes:
        runs: float64[R].
        resamples: float64[resamples].
    """

    runs: np.ndarray
    resamples: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.runs.mean())

    @property
    def deviation(self) -> float | None:
        """Of the runs; None of a single one."""
        return float(self.runs.std(ddof=1)) if len(self.runs) > 1 else None

    def interval(self, level: float = intervals.LEVEL) -> intervals.Interval:
        """The mean and its interval."""
        low, high = intervals.percentiles(self.resamples, level=level)
        return intervals.Interval(self.mean, float(low), float(high))

    def row(self) -> dict[str, float | None]:
        """As results.json has it."""
        _, low, high = self.interval()
        return {"mean": self.mean, "deviation": self.deviation, "low": low, "high": high}


def f1(truth: np.ndarray, predicted: np.ndarray, classes: int, **options) -> Sample:
    """Macro-F1: the mean over classes of 2 hits / (pictures of the class + answers of the class).

    A class that is neither true nor answered does not count, as in scikit-learn; nor does -1.

    Args:
        truth: int[N]. predicted: int[R, N]. classes: C.
        **options: resamples and seed. Equal seeds draw alike, which pairs two samples.
    """
    return _sample(_macro_f1, truth, predicted, classes, **options)


def accuracy(truth: np.ndarray, predicted: np.ndarray, classes: int, **options) -> Sample:
    """The share of right answers; see `f1`."""
    return _sample(_accuracy, truth, predicted, classes, **options)


def difference(of: Sample, over: Sample) -> Sample:
    """`of` minus `over`, paired by picture, and by run where both have as many."""
    if len(of.resamples) != len(over.resamples):
        raise ValueError(
            f"samples of {len(of.resamples)} and {len(over.resamples)} resamples do not pair up"
        )
    runs = of.runs - (over.runs if len(of.runs) == len(over.runs) else over.runs.mean())
    return Sample(runs, of.resamples - over.resamples)


def change(of: Sample, over: Sample) -> dict[str, float | None]:
    """The difference as results.json has it; relative to `over`, None where that is zero."""
    value, low, high = difference(of, over).interval()
    relative = value / over.mean if over.mean else None
    return {"value": value, "low": low, "high": high, "relative": relative}


def uniform(count: int, classes: int, runs: int, *, seed: int = 0) -> np.ndarray:
    """int64[R, N]: answers drawn uniformly, the random baseline of Table 1."""
    if classes < 1:
        raise ValueError(f"classes={classes}: there must be one to draw")
    return np.random.default_rng(seed).integers(0, classes, (runs, count))


def table(
    truth: np.ndarray,
    predicted: Mapping[str, np.ndarray],
    classes: int,
    *,
    over: str | None = None,
    **options,
) -> list[dict[str, Any]]:
    """A row for each variant: F1 and accuracy, and the change of F1 against one of them.

    Args:
        truth: int[N]. predicted: {variant: int[R, N]}. classes: C.
        over: the variant that changes are against.
        **options: resamples and seed, as in `f1`.

    Returns:
        {"variant", "runs", "images", "f1", "accuracy": {"mean", "deviation", "low", "high"},
        "change": {"value", "low", "high", "relative"} or None}; relative is None over zero.
    """
    scores = {name: f1(truth, said, classes, **options) for name, said in predicted.items()}
    rows = []
    for name, said in predicted.items():
        compared = over in scores and name != over
        rows.append({
            "variant": name, "runs": len(scores[name].runs), "images": len(truth),
            "f1": scores[name].row(),
            "accuracy": accuracy(truth, said, classes, **options).row(),
            "change": change(scores[name], scores[over]) if compared else None,
        })  # fmt: skip
    return rows


@dataclasses.dataclass(frozen=True)
class Claim:
    """F1 of some variants lies above that of another, or below, on all tasks or most.

    Attributes:
        text: the claim.
        of: ("model" or a probe, variant), each compared with
        over: (the same), on every task.
        sign: 1 for above, -1 for below.
        misses: comparisons in which it may be otherwise.
        paper: what the paper found.
    """

    text: str
    of: tuple[tuple[str, str], ...]
    over: tuple[str, str]
    sign: int = 1
    misses: int = 0
    paper: str = ""


PAPER = "paper"  # the name of the paper's probes
CLAIMS = (
    Claim(
        "Fine-tuning raises the model's F1, the projector's and the end-to-end one, on every task",
        (("model", PROJ), ("model", E2E)), ("model", ORIGINAL),
        paper="8 of 8, by +20 % to +652 %",
    ),
    Claim(
        "It lowers the F1 of a probe after the projection, on every task",
        ((PAPER, PROJ), (PAPER, E2E)), (PAPER, ORIGINAL), -1,
        paper="8 of 8, by \N{MINUS SIGN}3 % to \N{MINUS SIGN}30 %",
    ),
    Claim(
        "FT-E2E has a higher F1 than FT-Proj, on every task",
        (("model", E2E),), ("model", PROJ), paper="4 of 4",
    ),
    Claim(
        "CLIP zero-shot has a higher F1 than the model zero-shot, on all tasks but one",
        (("model", CLIP),), ("model", ORIGINAL), misses=1,
        paper="3 of 4, not Humanitarian",
    ),
)  # fmt: skip


def controls(probes: Sequence[str]) -> list[Claim]:
    """Claim 2 by other probes, and whether the projection itself loses what a probe can read."""
    again = [
        dataclasses.replace(
            CLAIMS[1], text=f"{CLAIMS[1].text}, by the {name} probe", paper="",
            of=((name, PROJ), (name, E2E)), over=(name, ORIGINAL),
        )
        for name in probes
    ]  # fmt: skip
    lost = [
        Claim(
            f"Before the projection a probe reads more than after it, on every task, by the {name}"
            " probe",
            ((name, BEFORE),), (name, ORIGINAL),
            paper="4 of 4, by probes of unlike depth and width" if name == PAPER else "",
        )
        for name in (PAPER, *probes)
    ]  # fmt: skip
    return again + lost


RULE = (
    "A comparison supports a claim when the interval of the difference lies on the claimed side of "
    "zero, and contradicts it when it lies on the other. A claim that may miss m of n comparisons "
    "holds when n - m or more support it, fails when more than m contradict it, and is undecided "
    "otherwise. Intervals are of 1 - 0.05 / (m + 1) to support and 1 - 0.05 / (n - m) to "
    "contradict, which keeps either error below 5 % (partial conjunction, Benjamini and Heller "
    "2008)."
)


def claims(
    tasks: Mapping[str, Task],
    asked: Sequence[Claim] = CLAIMS,
    *,
    alpha: float = 1 - intervals.LEVEL,
    **options,
) -> list[dict[str, Any]]:
    """The verdict of each claim, by RULE.

    Args:
        tasks: by name.
        asked: CLAIMS, and what `controls` gives.
        alpha: probability of either error that is allowed.
        **options: resamples and seed, as in `f1`.

    Returns:
        {"claim", "paper", "verdict": "holds", "fails" or "undecided", "reason", "comparisons":
        [{"task", "of", "variant", "over", "value", "low", "high", "side": "supports",
        "contradicts" or "neither"}]}. What was not measured is undecided, and the reason says so.
    """
    return [_judged(claim, tasks, alpha, options) for claim in asked]


def _judged(claim: Claim, tasks: Mapping[str, Task], alpha: float, options: dict) -> dict:
    head = {"claim": claim.text, "paper": claim.paper}
    missing = sorted(
        {
            variant if of == "model" else f"{variant} by the {of} probe"
            for task in tasks.values()
            for of, variant in (*claim.of, claim.over)
            if task.answers(of, variant) is None
        }
    )
    if missing or not tasks:
        reason = f"not measured: {', '.join(missing) or 'any task'}"
        return {**head, "verdict": "undecided", "reason": reason, "comparisons": []}

    n = len(tasks) * len(claim.of)
    levels = 1 - alpha / (claim.misses + 1), 1 - alpha / max(1, n - claim.misses)
    rows = []
    for name, task in tasks.items():
        base = f1(task.truth, task.answers(*claim.over), task.classes, **options)
        for of, variant in claim.of:
            score = f1(task.truth, task.answers(of, variant), task.classes, **options)
            moved = difference(score, base)
            value, low, high = moved.interval(levels[0])
            wide = moved.interval(levels[1])
            supports = low > 0 if claim.sign > 0 else high < 0
            contradicts = wide.high < 0 if claim.sign > 0 else wide.low > 0
            side = "supports" if supports else "contradicts" if contradicts else "neither"
            rows.append({"task": name, "of": of, "variant": variant, "over": claim.over[1],
                         "value": value, "low": low, "high": high, "side": side})  # fmt: skip
    counts = {side: sum(row["side"] == side for row in rows)
              for side in ("supports", "contradicts")}  # fmt: skip
    verdict = (
        "holds" if counts["supports"] >= n - claim.misses
        else "fails" if counts["contradicts"] > claim.misses
        else "undecided"
    )  # fmt: skip
    reason = f"{counts['supports']} of {n} support it, {counts['contradicts']} contradict it"
    return {**head, "verdict": verdict, "reason": reason, "comparisons": rows}


def moved(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> list[dict]:
    """How a domain's neurons moved within each module, and between modules.

    Args:
        before, after: {module: bool[L, F]}, the domain's neurons.

    Returns:
        A row a module: {"module", "before", "after", "kept", "jaccard", "chance" (the Jaccard
        index that sets of these sizes have by chance), "share_before", "share_after" (of the
        domain's neurons in all modules), "per_layer_before", "per_layer_after": [L]}.
    """
    if before.keys() != after.keys():
        raise ValueError(f"modules differ: {', '.join(before)} before, {', '.join(after)} after")
    totals = [max(1, sum(int(mask.sum()) for mask in masks.values())) for masks in (before, after)]
    rows = []
    for module, old in before.items():
        new = after[module]
        old, new = (checks.mask(mask, f"the mask of {module}") for mask in (old, new))
        if old.shape != new.shape or not old.size:
            raise ValueError(f"{module}: masks {old.shape} before and {new.shape} after")
        sizes, kept = (int(old.sum()), int(new.sum())), int((old & new).sum())
        expected = math.prod(sizes) / old.size
        rows.append({
            "module": module, "before": sizes[0], "after": sizes[1], "kept": kept,
            "jaccard": kept / max(1, sum(sizes) - kept),
            "chance": expected / max(1.0, sum(sizes) - expected),
            "share_before": sizes[0] / totals[0], "share_after": sizes[1] / totals[1],
            "per_layer_before": old.sum(1).tolist(), "per_layer_after": new.sum(1).tolist(),
        })  # fmt: skip
    return rows


def _sample(metric, truth, predicted, classes, *, resamples=intervals.RESAMPLES, seed=0) -> Sample:
    truth = checks.integers(truth, "truth", axes="[N]")
    predicted = checks.integers(predicted, "answers")
    if predicted.ndim != 2 or predicted.shape[1:] != truth.shape or not predicted.size:
        raise ValueError(f"answers must be int[runs, {len(truth)}], got {predicted.shape}")
    if truth.min() < 0 or predicted.min() < -1 or max(truth.max(), predicted.max()) >= classes:
        raise ValueError(f"class ids must lie in 0 to {classes - 1}; -1 is an answer of no class")
    pictures = intervals.draws(len(truth), resamples=resamples, seed=seed).astype(np.float64)
    runs = intervals.draws(len(predicted), resamples=resamples, seed=(seed, 1))
    once = np.ones((1, len(truth)))
    values = metric(pictures, truth, predicted, classes)
    return Sample(
        metric(once, truth, predicted, classes)[0], (values * runs).sum(1) / len(predicted)
    )


def _macro_f1(drawn, truth, predicted, classes) -> np.ndarray:
    """float64[resamples, R], of pictures drawn so often: float64[resamples, N], whole numbers."""
    is_class = truth[:, None] == np.arange(classes)  # [N, C]
    true = drawn @ is_class.astype(np.float64)
    out = np.empty((len(drawn), len(predicted)))
    for run, answer in enumerate(predicted):
        says = answer[:, None] == np.arange(classes)
        both = true + drawn @ says.astype(np.float64)
        hits = drawn @ (is_class & says).astype(np.float64)
        values = np.divide(2 * hits, both, out=np.zeros(both.shape), where=both > 0)
        out[:, run] = values.sum(1) / np.maximum((both > 0).sum(1), 1)
    return out


def _accuracy(drawn, truth, predicted, classes) -> np.ndarray:
    return drawn @ (predicted == truth).T.astype(np.float64) / len(truth)
