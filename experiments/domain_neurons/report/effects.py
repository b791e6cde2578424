"""Section of the report on own neurons against controls, and the effects that tests could find."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.analysis import power
from mllm_jax.report import page, parts
from mllm_jax.report.report import Results

CONTROLS = {
    "rate": "rate-matched neurons", "layer": "random neurons", "entropy": "high-entropy neurons",
}  # fmt: skip
NEVER = "could not have been found"
Row = Mapping[str, Any]


def smallest(possible: Iterable[float | None]) -> float | None:
    """Return the smallest effect that each of several tests could find, if any."""
    values = list(possible)
    known = [value for value in values if value is not None and value <= 1]
    return max(known) if known and len(known) == len(values) else None


def found(count: int, tests: int, possible: float | None) -> str:
    """Return how many tests are beyond chance, or that none could have been.

    Args:
      count: The number of tests beyond chance.
      tests: The number of tests; page.DASH is returned for none.
      possible: The smallest effect that they could have found, as a share of the answers.
    """
    if not tests:
        return page.DASH
    if count:
        return f"{count} of {tests}"
    if possible is None:
        return NEVER
    return f"none of {tests}; below {100 * possible:.1f} points {NEVER}"


def family(results: Results, name: str) -> tuple[float | None, float | None]:
    """Return the effects, possible and likely, that each test of a family of cells could find."""
    rows = [row for row in results["power"] if row["family"] == name]
    possible, likely = (smallest(row[key] for row in rows) for key in ("possible", "likely"))
    return possible, likely


def select(
    results: Results, module: str, control: str, measure: str, tokens: str | None = None
) -> list[Row]:
    """Return the effects of a module, one per domain."""
    wanted = {"module": module, "control": control, "measure": measure, "tokens": tokens}
    return [r for r in results["effects"] if all(r[k] == value for k, value in wanted.items())]


def beyond(rows: Sequence[Row]) -> str:
    """Return how many effects on accuracy are beyond chance."""
    count = sum(row["p_holm"] is not None and row["p_holm"] <= power.LEVEL for row in rows)
    return found(count, len(rows), smallest(row["possible"] for row in rows))


def effects(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on own neurons against controls; None if there are none."""
    rows = results["effects"]
    if not rows:
        return None
    kinds = [kind for kind in CONTROLS if any(row["control"] == kind for row in rows)]
    tokens = next((row["tokens"] for row in rows if row["tokens"]), None)
    modules = list(dict.fromkeys(row["module"] for row in rows))
    domains = [d for d in results["domains"] if any(row["data"] == d for row in rows)]

    def cells(module: str, domain: str, kind: str) -> list[str]:
        accuracy, moved = (
            next((r for r in select(results, module, kind, *of) if r["data"] == domain), None)
            for of in (("accuracy", None), ("relative_l2", tokens))
        )
        return [
            parts.title(module), domain, CONTROLS[kind],
            *(_format(row) if row else page.DASH for row in (accuracy, moved)),
            _format_likely(accuracy["likely"] if accuracy else None),
            (accuracy and accuracy["verdict"]) or page.DASH,
        ]  # fmt: skip

    return page.Section(
        title="Own neurons against controls",
        reading=_read_rates(results, kinds),
        table=page.Table(
            ["module", "domain", "control", "points",
             f"relative L2 ({tokens})" if tokens else "relative L2", "likely found", "verdict"],
            [cells(m, d, k) for m in modules for d in domains for k in kinds],
        ),
        note="Own minus control: the change of accuracy, in points, and of the deviation of hidden "
        "states. Rate-matched: neurons of the same layers that are active on nearly the same share "
        "of the domain's tokens, and about as strongly; random: any neurons of the same layers; "
        "high-entropy: neurons of the same layers that are as active in every domain. Draws: "
        f"{', '.join(f'{_draws(rows, kind)} {CONTROLS[kind]}' for kind in kinds)}. Brackets are "
        "95 % t intervals over pictures and draws, both taken as samples; a single draw has no "
        "interval, and few draws have wide ones. Likely found: the difference of accuracy that "
        f"four of five such studies would find beyond chance (Holm); {NEVER} if no difference "
        "can be. Verdict, of accuracy: an effect (Holm), none within "
        f"{100 * rows[0]['margin']:g} points (two one-sided tests), or undecided: an effect that "
        "is not significant may still exist.",
        data=[_effects_csv(folder, rows), *_controls_csv(folder, results),
              *_power_csv(folder, results)],
    )  # fmt: skip


def _read_rates(results: Results, kinds: Sequence[str]) -> str:
    """Return the sentences on how active the neurons and their controls are."""
    rows = results["controls"]
    if not rows:
        return "No activations were counted, so the controls match only by layer."
    clauses = []
    for kind in kinds:
        of = [row for row in rows if row["control"] == kind and row["drawn_rate"] is not None]
        if of:
            clauses.append(f"{CONTROLS[kind]} on {_mean(of, 'drawn_rate')}")
    matched = [row for row in rows if row["control"] == "rate"]
    text = (
        f"Domain neurons are active on {_mean(rows, 'rate')} of their domain's tokens"
        f"{''.join(f', {part}' for part in clauses)}."
    )
    if not matched:
        return f"{text} None of the controls match these rates."
    missed = [u for row in matched for u in row["unmatched"]]
    layers = sum(row["layers"] for row in matched)
    if not missed:
        return f"{text} In all {layers:,} layers with neurons, matched rates are within 2 points."
    gaps = [abs(u["difference"]) for u in missed if u["difference"] is not None]
    largest = f", by up to {100 * max(gaps):.0f} points" if gaps else ""
    lacking = sum(u["missing"] for u in missed)
    short = f"; {lacking:,} neurons have no counterpart" if lacking else ""
    return (
        f"{text} In {len(missed):,} of {layers:,} layers with neurons there are too few others "
        f"that are as active, and the controls miss{largest}{short} (tables/controls.csv)."
    )


def _mean(rows: Sequence[Row], key: str) -> str:
    """Return the mean rate over neurons of all rows."""
    weights = [row["neurons"] for row in rows]
    return parts.percent(float(np.average([row[key] for row in rows], weights=weights)))


def count_draws(runs: Sequence[Row], kind: str) -> int:
    """Return how many draws of a kind of control are among ablation runs."""
    return len({run["draw"] for run in runs if run["control"] == kind})


def _draws(rows: Sequence[Row], kind: str) -> int:
    return next(row["draws"] for row in rows if row["control"] == kind)


def _format(row: Row) -> str:
    """Return an effect and its interval; accuracies in points."""
    scale, digits = (100, 1) if row["measure"] == "accuracy" else (1, 3)

    def signed(value: float) -> str:
        return f"{scale * value:+.{digits}f}".replace("-", page.MINUS)

    value = signed(row["difference"])
    if row["low"] is None:
        return value
    return f"{value} [{signed(row['low'])}, {signed(row['high'])}]"


def _format_likely(likely: float | None) -> str:
    return NEVER if likely is None or likely > 1 else f"{100 * likely:.1f} points"


def _effects_csv(folder: pathlib.Path, rows: Sequence[Row]) -> tuple[str, str]:
    columns = [
        "module", "data", "control", "draws", "n", "measure", "tokens", "own", "drawn",
        "difference", "low", "high", "p", "p_holm", "possible", "likely", "margin", "p_equal",
        "verdict",
    ]  # fmt: skip
    return parts.write_csv(folder, "effects", columns, [[row[c] for c in columns] for row in rows])


def _controls_csv(folder: pathlib.Path, results: Results) -> list[tuple[str, str]]:
    columns = [
        "module", "data", "control", "draws", "neurons", "rate", "drawn_rate", "mean", "drawn_mean",
        "layers",
    ]  # fmt: skip
    missed = ["layer", "difference", "missing"]
    rows = [
        [*(row[c] for c in columns), *(u[c] for c in missed)]
        for row in results["controls"]
        for u in row["unmatched"] or [dict.fromkeys(missed)]
    ]
    head = [*columns, "unmatched_layer", "rate_difference", "missing"]
    return [parts.write_csv(folder, "controls", head, rows)] if rows else []


def _power_csv(folder: pathlib.Path, results: Results) -> list[tuple[str, str]]:
    columns = ["family", "data", "tests", "n", "possible", "likely"]
    rows = [[row[c] for c in columns] for row in results["power"]]
    return [parts.write_csv(folder, "power", columns, rows)] if rows else []
