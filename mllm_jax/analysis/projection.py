"""Tables and claims of the projection study (Verma et al. 2024), from the answers of all runs.

A variant (Original, FT-Proj, FT-E2E, or a baseline) assigns a class to each test picture in R runs
with different seeds: int[R, N], -1 where an answer gives no class. Probes do the same.

    task = Task(truth, classes, predicted={"Original": ..., "FT-Proj": ..., "FT-E2E": ...},
                probed={"paper": {"before": ..., "Original": ..., "FT-Proj": ..., "FT-E2E": ...}})
    table(task.truth, task.predicted, classes, over="Original")  # rows of Table 1
    claims({"objects": task, ...})                              # each claim with its verdict

Intervals are percentile bootstraps that resample pictures and runs; differences are paired by
picture and by run. TABLE_1, TABLE_2 and TABLE_3 hold the results of the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.analysis import checks, intervals, jaccard
from mllm_jax.analysis.scores import (
    MARGIN,
    Sample,
    accuracy,
    change,
    detectable,
    difference,
    equivalent,
    f1,
)

CLIP, ORIGINAL, PROJ, E2E, BEFORE = "CLIP zero-shot", "Original", "FT-Proj", "FT-E2E", "before"

# Verma et al. 2024, Tables 1 to 3, by task. Tables 1 and 3 hold macro-F1 and accuracy, Table 2 the
# macro-F1 of probes after the projection. Table 1 is a mean over 5 runs.
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
    """The answers and probe predictions of one task.

    Attributes:
      truth: int[N], the classes of the test pictures.
      classes: Number of classes, C.
      predicted: {variant: int[R, N]}, the classes that the model answers.
      probed: {probe: {variant: int[R, N]}}, the predictions of a probe after the projection;
        under "before", those before it. The paper's probes are named "paper".
    """

    truth: np.ndarray
    classes: int
    predicted: Mapping[str, np.ndarray]
    probed: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def answers(self, reader: str, variant: str) -> np.ndarray | None:
        """Return int[R, N] of the model ("model") or of a named probe; None if not measured."""
        return (self.predicted if reader == "model" else self.probed.get(reader, {})).get(variant)


def uniform(count: int, classes: int, runs: int, *, seed: int = 0) -> np.ndarray:
    """Draw answers int64[R, N] uniformly: the random baseline of Table 1."""
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
    """Return a row for each variant: F1, accuracy, and the change of F1 from one of them.

    Args:
      truth: int[N], the true classes.
      predicted: {variant: int[R, N]}, the predicted classes.
      classes: Number of classes, C.
      over: The variant that changes are measured from.
      **options: Resamples and seed, as in `f1`.

    Returns:
      {"variant", "runs", "images", "f1", "accuracy": {"mean", "deviation", "low", "high"},
      "change": {"value", "low", "high", "relative", "equivalent"} or None}; "relative" is None if
      the baseline is 0, and "equivalent" is whether the change is shown to be within
      `scores.MARGIN`.
    """
    scores = {name: f1(truth, answers, classes, **options) for name, answers in predicted.items()}
    rows = []
    for name, answers in predicted.items():
        baseline = scores.get(over) if over is not None and name != over else None
        rows.append({
            "variant": name, "runs": len(scores[name].runs), "images": len(truth),
            "f1": scores[name].row(),
            "accuracy": accuracy(truth, answers, classes, **options).row(),
            "change": None if baseline is None else change(scores[name], baseline),
        })  # fmt: skip
    return rows


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that the F1 of some variants is higher, or lower, than that of another on most tasks.

    Attributes:
      text: The claim in words.
      of: Pairs ("model" or the name of a probe, variant) that are compared on every task.
      over: The pair that each of `of` is compared with.
      sign: 1 for higher, -1 for lower.
      misses: Number of comparisons that may contradict the claim.
      paper: The result of the paper.
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
        "Fine-tuning lowers the F1 of a probe after the projection, on every task",
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
    """Return claim 2 for other probes, and claims that the projection loses what probes read."""
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
    statements: Sequence[Claim] = CLAIMS,
    *,
    alpha: float = 1 - intervals.LEVEL,
    **options,
) -> list[dict[str, Any]]:
    """Return the verdict on each claim, by RULE.

    Args:
      tasks: The tasks, by name.
      statements: The claims to judge: CLAIMS, and those of `controls`.
      alpha: Highest probability of either error.
      **options: Resamples and seed, as in `f1`.

    Returns:
      {"claim", "criterion", "paper", "verdict": "holds", "fails" or "undecided", "reason",
      "found", "power", "comparisons": [{"task", "of", "variant", "over", "value", "low", "high",
      "side": "supports", "contradicts" or "neither", "equivalent" (within `scores.MARGIN`),
      "possible", "likely" (see `power.Detectable`)}]}. What was not measured is undecided, and
      the reason says so.
    """
    return [_judge(claim, tasks, alpha, options) for claim in statements]


def _judge(
    claim: Claim, tasks: Mapping[str, Task], alpha: float, options: dict[str, Any]
) -> dict[str, Any]:
    n = len(tasks) * len(claim.of)
    head = {"claim": claim.text, "criterion": _criterion(claim, n), "paper": claim.paper}
    missing = sorted(
        {
            variant if reader == "model" else f"{variant} by the {reader} probe"
            for task in tasks.values()
            for reader, variant in (*claim.of, claim.over)
            if task.answers(reader, variant) is None
        }
    )
    if missing or not tasks:
        reason = f"not measured: {', '.join(missing) or 'any task'}"
        nothing = {"found": "not measured", "power": "nothing could be found", "comparisons": []}
        return {**head, "verdict": "undecided", "reason": reason, **nothing}

    rows = [
        {"task": name, **row}
        for name, task in tasks.items()
        for row in _comparisons(claim, task, n, alpha, options)
    ]
    counts = {side: sum(row["side"] == side for row in rows)
              for side in ("supports", "contradicts")}  # fmt: skip
    verdict = (
        "holds" if counts["supports"] >= n - claim.misses
        else "fails" if counts["contradicts"] > claim.misses
        else "undecided"
    )  # fmt: skip
    equal = sum(row["equivalent"] for row in rows)
    reason = (
        f"{counts['supports']} of {n} support it, {counts['contradicts']} contradict it"
        f"{f', {equal} are within {MARGIN:g} of no change' if equal else ''}"
    )
    found = ", ".join(
        f"{row['task']}, {row['variant']} {row['value']:+.2f} [{row['low']:+.2f}, "
        f"{row['high']:+.2f}]"
        for row in rows
    )
    return {**head, "verdict": verdict, "reason": reason, "found": found,
            "power": _power(rows), "comparisons": rows}  # fmt: skip


def _criterion(claim: Claim, n: int) -> str:
    side = "above" if claim.sign > 0 else "below"
    return f"the intervals of {n - claim.misses} or more of {n} differences of F1 lie {side} zero"


def _power(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the smallest effect that every comparison of a claim can detect, in words."""
    likely = [row["likely"] for row in rows]
    if None in likely:
        return "no change of so few answers could have been found"
    return f"differences of {max(likely):.2f} are found in four of five studies"


def _comparisons(
    claim: Claim, task: Task, n: int, alpha: float, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Compare the variants of a claim on one task, of n comparisons in all."""

    def score(reader: str, variant: str) -> Sample:
        answers = task.answers(reader, variant)
        assert answers is not None  # `_judge` has looked for what is missing
        return f1(task.truth, answers, task.classes, **options)

    baseline = score(*claim.over)
    for reader, variant in claim.of:
        gain = difference(score(reader, variant), baseline)
        value, low, high = gain.interval(1 - alpha / (claim.misses + 1))
        _, lowest, highest = gain.interval(1 - alpha / max(1, n - claim.misses))
        supports = low > 0 if claim.sign > 0 else high < 0
        contradicts = highest < 0 if claim.sign > 0 else lowest > 0
        side = "supports" if supports else "contradicts" if contradicts else "neither"
        possible, likely = detectable(gain, level=alpha / (claim.misses + 1))
        yield {"of": reader, "variant": variant, "over": claim.over[1],
               "value": value, "low": low, "high": high, "side": side,
               "equivalent": equivalent(gain), "possible": possible, "likely": likely}  # fmt: skip


def moved(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Compare the neurons of a domain before and after training, in each module.

    Args:
      before: {module: bool[L, F]}, the domain's neurons before.
      after: {module: bool[L, F]}, the domain's neurons after.

    Returns:
      A row for each module: {"module", "before", "after", "kept", "jaccard", "chance" (the
      Jaccard index of random sets of these sizes), "share_before", "share_after" (of the
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
        rows.append({
            "module": module, "before": sizes[0], "after": sizes[1], "kept": kept,
            "jaccard": float(jaccard.index(kept, *sizes)),
            "chance": float(jaccard.by_chance(*sizes, old.size)),
            "share_before": sizes[0] / totals[0], "share_after": sizes[1] / totals[1],
            "per_layer_before": old.sum(1).tolist(), "per_layer_after": new.sum(1).tolist(),
        })  # fmt: skip
    return rows
