"""Judge MMNeuron's claims (Huo et al., EMNLP 2024) by the results of the study.

Each claim has a criterion that the results meet, contradict or leave open, and states which effects
could be found: a claim tested on too few questions is undecided, not refuted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import scipy.stats

from experiments.domain_neurons.effects import EFFECT, NONE
from experiments.modules import in_order, widest
from mllm_jax.analysis import intervals, power

Row = Mapping[str, Any]
LARGEST_CHANGE = 0.1  # "at most 10 %" (abstract)


class Claim(NamedTuple):
    """A claim of the paper with its verdict.

    Attributes:
      claim: What the paper says.
      criterion: The criterion of the verdict.
      found: The measured values, with intervals.
      verdict: "holds", "fails" or "undecided".
      power: The effects that such a study could find.
    """

    claim: str
    criterion: str
    found: str
    verdict: str
    power: str


def judge(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the verdict on each claim, from the other keys of results.json."""
    claims = (
        _existence(results["stability"], results["selection"]),
        _hidden_states(results["effects"]),
        _accuracy(results["ablation"], results["baseline"]),
        _stages(results["stages"]),
    )
    return [claim._asdict() for claim in claims]


def _existence(stability: Mapping[str, Row], selection: Mapping[str, Row]) -> Claim:
    tested = {
        module: stability[module]
        for module in in_order(stability)
        if stability[module].get("beyond_chance") is not None
    }
    beyond = {module: row["beyond_chance"] for module, row in tested.items()}
    found = "; ".join(
        f"{module}: {count:,} of {selection[module]['selected']:,}, agreement of resamples "
        f"{_range(tested[module]['bootstrap'])}"
        for module, count in beyond.items()
    )
    some = [count > 0 for count in beyond.values()]
    level = next((row["level"] for row in tested.values()), power.LEVEL)
    return Claim(
        "Every module has neurons that belong to a visual domain.",
        "In every module some entropies are lower than any under shuffled labels of domains.",
        found or "not tested: too few groups of pictures, or the neurons were given",
        _decide(some, [not has for has in some]),
        f"a false neuron appears in at most {100 * level:g} % of shuffled studies",
    )


def _hidden_states(effects: Sequence[Row]) -> Claim:
    rows = _widest(
        row for row in effects
        if (row["control"], row["measure"], row["tokens"]) == ("rate", "relative_l2", "image")
    )  # fmt: skip
    larger = [row["verdict"] == EFFECT and row["difference"] > 0 for row in rows]
    none = [
        row["verdict"] == NONE or (row["verdict"] == EFFECT and row["difference"] < 0)
        for row in rows
    ]
    ranges = ", ".join(
        f"{row['data']} {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        for row in rows
        if row["low"] is not None
    )
    possible = [row["possible"] for row in rows if row["possible"] is not None]
    return Claim(
        "Hidden states change when the neurons of a domain are switched off.",
        "With a domain's own neurons off, the last residual of its image tokens moves farther than "
        "with neurons of the same layers and activation rates off: in all domains but one (Holm).",
        f"{sum(larger) or 'none'} of {len(rows)} domains; relative L2, own minus matched: {ranges}"
        if rows
        else "not measured",
        _decide(larger, none, misses=1),
        f"differences of {max(possible):.3f} or more" if possible else "nothing could be found",
    )


def _accuracy(ablation: Sequence[Row], baseline: Mapping[str, Row]) -> Claim:
    rows = _widest(row for row in ablation if row["control"] is None and row["mask"] == row["data"])
    counts = [baseline[row["data"]]["n"] for row in rows]
    # An interval over few changed answers is too narrow.
    within = [
        max(abs(row["low"]), abs(row["high"])) <= LARGEST_CHANGE
        and intervals.chance_of_fewer(row["difference"], LARGEST_CHANGE, n) <= power.LEVEL
        for row, n in zip(rows, counts, strict=True)
    ]
    beyond = [
        _chance(abs(row["difference"]), n) <= power.LEVEL / len(rows)
        for row, n in zip(rows, counts, strict=True)
    ]
    ranges = ", ".join(
        f"{row['data']} {100 * row['difference']:+.1f} "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        for row in rows
    )
    likely = [power.answers(n, len(rows)).likely for n in counts]
    known = [value for value in likely if value is not None]
    return Claim(
        "Accuracy changes by at most ten points.",
        "In every domain the 95 % interval of the change, with its own neurons off, lies within "
        "ten points; a change that is too rare under ten points (Bonferroni) contradicts.",
        f"{sum(within) or 'none'} of {len(rows)} domains within; points: {ranges}"
        if rows
        else "not measured",
        _decide(within, beyond),
        f"changes of {100 * max(known):.0f} points are found in four of five studies"
        if len(known) == len(likely) and known
        else "no change of accuracy could have been found beyond chance",
    )


def _chance(change: float, questions: int) -> float:
    """Return the probability of so large a change if an answer changes with LARGEST_CHANGE."""
    changed = math.ceil(change * questions - 1e-9)
    return float(scipy.stats.binom.sf(changed - 1, questions, LARGEST_CHANGE))


def _stages(stages: Mapping[str, Any]) -> Claim:
    image = stages["all"]
    decided = image["boundaries"] is not None
    holds = decided and image["claimed"]
    ends = ", ".join(
        f"{low} to {high}"
        for low, high in zip(image["low"] or (), image["high"] or (), strict=True)
    )
    return Claim(
        "Image tokens pass three stages in the language model.",
        "The entropy of the logit lens over layers has three segments, of which the second falls "
        "and the third rises, with boundaries that the pictures determine.",
        f"{image['verdict']}{f'; boundaries between layers {ends}' if ends else ''}",
        "holds" if holds else "fails" if decided else "undecided",
        stages["rule"],
    )


def _widest(rows: Any) -> list[Row]:
    """Return the rows of the module with the most neurons."""
    rows = list(rows)
    chosen = widest([row["module"] for row in rows]) if rows else None
    return [row for row in rows if row["module"] == chosen]


def _decide(supports: Sequence[bool], contradicts: Sequence[bool], misses: int = 0) -> str:
    """Return the verdict of comparisons of which some may miss."""
    if supports and sum(supports) >= len(supports) - misses:
        return "holds"
    return "fails" if sum(contradicts) > misses else "undecided"


def _range(interval: Mapping[str, Sequence[float]]) -> str:
    return f"{min(interval['low']):.2f} to {max(interval['high']):.2f}"
