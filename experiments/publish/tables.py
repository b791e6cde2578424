"""Tables of published results, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.domain_neurons.report.effects import CONTROLS, select
from experiments.modules import in_order
from experiments.projection.report import cells
from mllm_jax.analysis.projection import E2E, ORIGINAL, PROJ
from mllm_jax.report import parts
from mllm_jax.report.tables import markdown

Results = Mapping[str, Any]


def verdicts(results: Results) -> str:
    """Return the claims of a paper with their verdicts."""
    rows = [(row["claim"], parts.VERDICTS[row["verdict"]]) for row in results["claims"]]
    return markdown(("claim", "verdict"), rows)


def claims(results: Results) -> str:
    """Return the claims of a paper: what decides each, what was found, the verdict, the power."""
    return markdown(
        ("claim", "holds if", "found", "verdict", "could have been found"),
        [
            (row["claim"], row["criterion"], row["found"], parts.VERDICTS[row["verdict"]],
             row["power"])
            for row in results["claims"]
        ],
    )  # fmt: skip


def controls(results: Results, measure: str, tokens: str | None, digits: int) -> str:
    """Return the values of a measure with own neurons ablated, and with the controls ablated.

    Args:
      results: The results of the study of domain neurons.
      measure: Accuracy, or a deviation.
      tokens: The kind of token of a deviation.
      digits: The number of decimals; accuracy is a percentage.
    """
    scale = 100 if measure == "accuracy" else 1

    def value(number: float, sign: str = "") -> str:
        return f"{scale * number:{sign}.{digits}f}"

    rows = []
    for module in dict.fromkeys(row["module"] for row in results["effects"]):
        by_control = {kind: select(results, module, kind, measure, tokens) for kind in CONTROLS}
        for matched in by_control["rate"]:
            drawn = {
                kind: next(row["drawn"] for row in of if row["data"] == matched["data"])
                for kind, of in by_control.items()
                if of
            }
            less, low, high = (value(matched[key], "+") for key in ("difference", "low", "high"))
            rows.append(
                (parts.title(module), matched["data"], value(matched["own"]),
                 *map(value, drawn.values()), f"{less} [{low}, {high}]", matched["verdict"])
            )  # fmt: skip
    kinds = [CONTROLS[kind].removesuffix(" neurons") for kind in CONTROLS]
    return markdown(
        ("neurons of", "domain", "own", *kinds, "own less rate-matched", "verdict"), rows
    )


def modules(results: Results) -> str:
    """Return how many neurons of each module are selected, and how many chance does not explain."""
    rows = []
    for module in in_order(results["selection"]):
        selection, stability = results["selection"][module], results["stability"][module]
        shared = stability["halves"][-1]  # of the largest halves, by domain
        rows.append(
            (parts.title(module), f"{selection['selected']:,}", f"{stability['beyond_chance']:,}",
             f"{min(shared):.2f} to {max(shared):.2f}")
        )  # fmt: skip
    return markdown(("module", "selected", "beyond chance", "Jaccard index of halves"), rows)


def prompts(results: Results) -> str:
    """Return how many neurons the released prompts and all tokens share with those of pictures."""
    shared = results["released"]["modules"]
    rows = [
        (parts.title(module), *(f"{jaccard:.2f}" for jaccard in shared[module]["jaccard"]),
         f"{max(shared[module]['chance']):.3f}")
        for module in in_order(shared)
    ]  # fmt: skip
    return markdown(("module", *results["domains"], "at most by chance"), rows)


def answers(results: Results) -> str:
    """Return the macro-F1 of the answers of each variant, and its change by fine-tuning."""
    by_task = cells.group(results["answers"], "task", "variant")
    variants = list(next(iter(by_task.values())))
    changed = [variant for variant in variants if variant in (PROJ, E2E)]
    rows = [
        (task, *(_interval(of[variant]["f1"], "mean") for variant in variants),
         *(_interval(of[variant]["change"], "value", "+") for variant in changed))
        for task, of in by_task.items()
    ]  # fmt: skip
    return markdown(("task", *variants, *(f"{v} less {ORIGINAL}" for v in changed)), rows)


def probes(results: Results) -> str:
    """Return the macro-F1 of probes before and after the projection, by task and probe."""
    scores: dict[tuple[str, str], dict[str, str]] = {}
    for row in results["richness"]:
        of_pair = scores.setdefault((row["task"], row["probe"]), {})
        of_pair[row["variant"]] = _interval(row["f1"], "mean")
    variants = list(next(iter(scores.values())))
    rows = [(*pair, *(of_pair[v] for v in variants)) for pair, of_pair in scores.items()]
    return markdown(("task", "probe", *variants), rows)


def _interval(row: Results, value: str, sign: str = "") -> str:
    """Return a value with its interval as text."""
    mean, low, high = (f"{row[key]:{sign}.2f}" for key in (value, "low", "high"))
    return f"{mean} [{low}, {high}]"


Table = Callable[[Results], str]
OF_CLAIMS: dict[str, Table] = {"verdicts": verdicts, "claims": claims}
TABLES: dict[str, dict[str, Table]] = {
    "domain_neurons": OF_CLAIMS
    | {
        "deviation": lambda results: controls(results, "relative_l2", "image", 3),
        "accuracy": lambda results: controls(results, "accuracy", None, 1),
        "modules": modules,
        "prompts": prompts,
    },
    "projection": OF_CLAIMS | {"answers": answers, "probes": probes},
}
