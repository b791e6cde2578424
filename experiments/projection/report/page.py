"""The page of the projection study: figures, tables and index.html from its results.json.

The keys of results.json follow. A *value* is {"mean", "low", "high"}, a mean over runs with its
95 % interval, and has "deviation" if there are several runs; a *change* is {"value", "low",
"high", "relative", "equivalent"}. `analysis.projection` computes both. Keys in brackets
may be empty or absent.

    format             the version of these keys
    model, seeds       the model's name; the seeds of its runs
    projector          the projector's file; "" for the model's own
    tasks              {task: {"topic", "classes": [names], "train", "test": numbers of pictures}}
    answers            Table 1: rows of `projection.table` over Original, each with its "task"
    richness           Tables 2 and 3: such rows, each with its "task" and "probe" ("paper",
                       "linear", "matched"); the variant "before" is before the projection
    claims             the result of `projection.claims`
    [controls]         the same of `projection.controls`
    rule               `projection.RULE`
    [depth]            {"task", "variant", "tokens" ("image", "last"), "layer"} and a value: the F1
                       of a linear probe on the output of each layer of the LM
    [factors]          {"task", "recipe", "factor", "setting", "f1": value, "change": change over
                       the first recipe or None, "probe": value of the paper's probe or None}
    [neurons]          rows of `projection.moved`, each with its "task" and "variant"
    [changed]          {"task", "variant", "domain neurons" (before or after), "neurons", "jaccard",
                       "chance"}: those of most changed weights and the domain's
    [trained]          {"task", "variant", "neurons", "f1": value, "change": change over Original}:
                       fine-tuning of selected neurons only
    [ablation]         {"task", "variant", "ablated" (whose neurons), "neurons", "f1": value,
                       "change": change against no ablation}; suppression of one of two classes
                       has "recall" as well: {class: share of its pictures given its name}

"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.projection.report import cells, neurons, plots, scores, training
from mllm_jax.analysis import projection
from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PAPER, PROJ
from mllm_jax.report import page, parts
from mllm_jax.report.report import Report, Results

KEYS = ("model", "projector", "seeds", "tasks", "answers", "richness", "claims", "rule")


def _lead(results: Results) -> str:
    return (
        f"Where are domain-specific visual attributes of {page.model_name(results)} modelled after "
        "fine-tuning, in the projection or in the language model? Fine-tuned: the projector only "
        f"({PROJ}), and projector and language model end to end ({E2E})."
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    tasks = results["tasks"].values()
    holding = sum(row["verdict"] == "holds" for row in results["claims"])
    return [
        (f"{len(tasks)}", "tasks"),
        (f"{sum(len(task['classes']) for task in tasks)}", "classes"),
        (f"{sum(task['test'] for task in tasks):,}", "test pictures"),
        (f"{len(results['seeds'])}", "seeds"),
        (f"{holding} of {len(results['claims'])}", "claims hold"),
    ]


def _overview(folder: pathlib.Path, results: Results) -> page.Figure:
    stages = {BEFORE: "before the\nprojection", ORIGINAL: "after it,\nOriginal"}

    def points(
        rows: Iterable[cells.Row], variants: Sequence[str], names: Mapping[str, str]
    ) -> dict[str, dict[str, Any]]:
        by_task = cells.group(rows, "task", "variant")
        return {
            task: {names.get(v, v): by_variant[v]["f1"] for v in variants if v in by_variant}
            for task, by_variant in by_task.items()
        }

    probe = [row for row in results["richness"] if row["probe"] == PAPER]
    figure = plots.slopes(
        {
            "Answers of the model": points(results["answers"], (ORIGINAL, PROJ, E2E), {}),
            "Scores of a probe": points(probe, (BEFORE, ORIGINAL, PROJ, E2E), stages),
        },
        "macro-F1",
    )
    return parts.write_figure(
        folder, "overview", figure,
        "Macro-F1 of the model and of a probe, before and after fine-tuning",
        "Left: the model's answers. Right: the paper's probes on the features before and after "
        "the projection. One line per task; bars are 95 % intervals.",
    )  # fmt: skip


def _claims(folder: pathlib.Path, results: Results) -> page.Section:
    claims = [*results["claims"], *results.get("controls", ())]
    columns = (
        "task", "of", "variant", "over", "value", "low", "high", "side", "equivalent", "possible",
        "likely",
    )  # fmt: skip
    lines = [
        (row["claim"], row["verdict"], *(comparison[c] for c in columns))
        for row in claims
        for comparison in row["comparisons"]
    ]
    without = (
        ""
        if any(row["variant"] == CLIP for row in results["answers"])
        else f" The claim on {CLIP} is undecided because it was not measured: config.clip names "
        "no CLIP with a text tower."
    )
    return page.Section(
        title="The claims",
        reading=f"{parts.count_verdicts(results['claims'])}{without} {cells.one_seed(results)}"
        f"{_naive(results)}",
        table=page.Table(
            (
                "verdict", "claim, on macro-F1", "comparisons", "found",
                "what could have been found", "in the paper",
            ),
            [
                (
                    parts.VERDICTS[row["verdict"]], row["claim"], row["reason"], row["found"],
                    row["power"], row["paper"] or page.DASH,
                )
                for row in claims
            ],
        ),
        note=_claims_note(results, more=len(claims) > len(results["claims"])),
        data=[parts.write_csv(folder, "claims", ("claim", "verdict", *columns), lines)],
    )  # fmt: skip


def _naive(results: Results) -> str:
    """Return the sentence on what Original has seen; none where its projector is another."""
    if results["model"] != "embedded" or results["projector"]:
        return ""
    return (
        f"{ORIGINAL} is not naive: the projector that ships was trained on pictures of these very "
        "domains (not on the test pictures), so that less is left to fine-tuning than in the "
        "paper. config.projector takes one that was trained without a domain."
    )


def _claims_note(results: Results, more: bool) -> str:
    criteria = " ".join(
        f"{number}: {row['criterion']}." for number, row in enumerate(results["claims"], 1)
    )
    others = (
        f" The first {len(results['claims'])} are the paper's; the others repeat them with probes "
        "that are the same on both sides of the projection."
        if more
        else ""
    )
    return f"{results['rule']} Criteria. {criteria}{others}"


def _paper(folder: pathlib.Path, results: Results) -> page.Section:
    def pair(values: tuple[float, float]) -> str:
        return f"{values[0]:.4f} / {values[1]:.4f}"

    models = [(f"model, {v}", *map(pair, row)) for v, row in projection.TABLE_1.items()]
    before = ("probe, before the projection", *map(pair, projection.TABLE_3))
    after = [(f"probe, {v}", *(f"{f1:.4f}" for f1 in row)) for v, row in projection.TABLE_2.items()]
    return page.Section(
        title="Results of the paper",
        reading="LLaVA-1.5-7B on four data sets: fine-tuning raises the model's F1 on every task, "
        "and lowers the F1 of a probe after the projection.",
        table=page.Table(("macro-F1 / accuracy", *projection.TASKS), [*models, before, *after]),
        note="Verma et al. 2024, Cross-Modal Projection in Multimodal LLMs Doesn't Really Project "
        "Visual Attributes to Textual Space, Tables 1 to 3.",
    )


REPORT = Report(
    study="projection",
    keys=KEYS,
    title="The projection study",
    lead=_lead,
    facts=_facts,
    overview=_overview,
    sections=(
        _claims, scores.answers, scores.richness, scores.depth, scores.factors, neurons.neurons,
        training.changed, neurons.ablation, training.trained, neurons.suppression, _paper,
    ),
)  # fmt: skip
write = REPORT.write
