"""The report of the projection study: figures, tables and a page from its results.json.

Its keys. A *value* is {"mean", "low", "high"}, a mean over runs with its 95 % interval, and has
"deviation" where it is of several runs; a *change* is {"value", "low", "high", "relative"}. Both
are as `analysis.projection` makes them. Keys in brackets may be empty or absent.

    model, seeds       the model's name; the seeds of its runs
    tasks              {task: {"topic", "classes": [names], "train", "test": numbers of pictures}}
    answers            Table 1: rows of `projection.table` over Original, each with its "task"
    richness           Tables 2 and 3: such rows, each with its "task" and "probe" ("paper",
                       "linear", "matched"); the variant "before" is before the projection
    claims             what `projection.claims` gives
    [controls]         the same of `projection.controls`
    rule               `projection.RULE`
    [depth]            {"task", "variant", "tokens" ("image", "last"), "layer"} and a value: the F1
                       of a linear probe on what leaves each layer of the LM
    [factors]          {"task", "recipe", "factor", "setting", "f1": value, "change": change over
                       the first recipe or None, "probe": value of the paper's probe or None}
    [neurons]          rows of `projection.moved`, each with its "task" and "variant"
    [ablation]         {"task", "variant", "off" (whose neurons), "neurons", "f1": value, "change":
                       change against none off}; suppression of one of two classes has "called"
                       as well: {class: how often its pictures are called by its name}

`write` is a pure function of the results: it can be run again and leaves the same bytes.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mllm_jax.analysis import projection
from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PAPER, PROJ
from mllm_jax.report import figures, page, parts

KEYS = ("model", "seeds", "tasks", "answers", "richness", "claims", "rule")
FIXED = {
    "Random": "#A8A8A8", CLIP: "#CC79A7", BEFORE: "#009E73", ORIGINAL: "#5B5B5B",
    PROJ: "#0072B2", E2E: "#D55E00",
}  # fmt: skip
VERDICTS = {"holds": "✓ holds", "fails": "✗ fails", "undecided": "? undecided"}
VALUE = ("mean", "deviation", "low", "high")
CHANGE = ("value", "low", "high", "relative")


def write(workdir: str | os.PathLike, results: Mapping) -> None:
    """Writes figures/*.png, tables/*.csv and, last of all, index.html.

    Args:
        workdir: the study's folder.
        results: what results.json holds. A part that is empty has no section on the page.
    """
    parts.require(results, KEYS, "projection")
    folder = pathlib.Path(workdir)
    made = (
        _claims, _answers, _richness, _depth, _factors, _neurons, _ablation, _suppression, _paper,
    )  # fmt: skip
    sections = [section for part in made if (section := part(folder, results))]
    content = page.Page(
        title="The projection study",
        lead=f"Where do domain-specific visual attributes of {page.edited(results)} live after "
        "fine-tuning, in the projection or in the language model? Fine-tuned: the projector "
        f"alone ({PROJ}), and projector and language model end to end ({E2E}).",
        facts=_facts(results),
        figure=_overview(folder, results),
        sections=sections,
        data=page.RECORDS,
    )
    page.write(folder / "index.html", content)


def _facts(results: Mapping) -> list[tuple[str, str]]:
    tasks = results["tasks"].values()
    held = sum(row["verdict"] == "holds" for row in results["claims"])
    return [
        (f"{len(tasks)}", "tasks"),
        (f"{sum(len(task['classes']) for task in tasks)}", "classes"),
        (f"{sum(task['test'] for task in tasks):,}", "test pictures"),
        (f"{len(results['seeds'])}", "seeds"),
        (f"{held} of {len(results['claims'])}", "claims hold"),
    ]


def _overview(folder: pathlib.Path, results: Mapping) -> page.Figure:
    stages = {BEFORE: "before the\nprojection", ORIGINAL: "after it,\nOriginal"}

    def points(rows: Iterable[Mapping], variants: Sequence[str], names: Mapping) -> dict:
        found = _by(rows, "task", "variant")
        return {
            task: {names.get(v, v): by_variant[v]["f1"] for v in variants if v in by_variant}
            for task, by_variant in found.items()
        }

    probe = [row for row in results["richness"] if row["probe"] == PAPER]
    figure = figures.slopes(
        {
            "What the model answers": points(results["answers"], (ORIGINAL, PROJ, E2E), {}),
            "What a probe reads": points(probe, (BEFORE, ORIGINAL, PROJ, E2E), stages),
        },
        "macro-F1",
    )
    return parts.png(
        folder, "overview", figure,
        "Macro-F1 of the model and of a probe, before and after fine-tuning",
        "Left: the model's answers. Right: the paper's probes on the features before and after "
        "the projection. A line a task; bars are 95 % intervals.",
    )  # fmt: skip


def _claims(folder: pathlib.Path, results: Mapping) -> page.Section:
    asked = [*results["claims"], *results.get("controls", ())]
    columns = ("task", "of", "variant", "over", "value", "low", "high", "side")
    lines = [
        (row["claim"], row["verdict"], *(comparison[c] for c in columns))
        for row in asked
        for comparison in row["comparisons"]
    ]
    by_verdict = {
        verdict: sum(row["verdict"] == verdict for row in results["claims"])
        for verdict in VERDICTS
    }  # fmt: skip
    without = (
        ""
        if any(row["variant"] == CLIP for row in results["answers"])
        else f" That about {CLIP} is undecided because it was not measured: config.clip names no "
        "CLIP with a text tower."
    )
    return page.Section(
        title="The claims",
        reading=f"Of the paper's {len(results['claims'])} claims, {by_verdict['holds']} hold here, "
        f"{by_verdict['fails']} fail, and {by_verdict['undecided']} are undecided at this sample "
        f"size.{without}",
        table=page.Table(
            ("verdict", "claim, on macro-F1", "comparisons", "in the paper"),
            [
                (VERDICTS[row["verdict"]], row["claim"], row["reason"], row["paper"] or page.DASH)
                for row in asked
            ],
        ),
        note=f"{results['rule']} The first {len(results['claims'])} are the paper's; the others "
        "ask again with probes that are the same on both sides of the projection."
        if len(asked) > len(results["claims"])
        else results["rule"],
        data=[parts.csv(folder, "claims", ("claim", "verdict", *columns), lines)],
    )


def _answers(folder: pathlib.Path, results: Mapping) -> page.Section:
    rows = results["answers"]
    found = _by(rows, "task", "variant")
    hue = _hue(rows)
    figure = figures.forest(
        {"": {task: {v: row["f1"] for v, row in by_variant.items()}
              for task, by_variant in found.items()}},
        hue, "macro-F1", against=ORIGINAL,
    )  # fmt: skip
    above = {v: sum(_above(row) for row in rows if row["variant"] == v) for v in (PROJ, E2E)}
    return page.Section(
        title="What the model answers",
        reading=f"Zero-shot, the model's macro-F1 is {_mean(rows, ORIGINAL)} on average over "
        f"tasks; with its projector tuned {_mean(rows, PROJ)}, tuned end to end "
        f"{_mean(rows, E2E)}. The interval of the change lies above zero in {above[PROJ]} of "
        f"{len(found)} tasks for {PROJ}, in {above[E2E]} for {E2E}.",
        figures=[parts.png(folder, "answers", figure, "Macro-F1 by task and variant")],
        table=page.Table(
            ("task", "variant", "runs", "macro-F1", "interval", "accuracy", "change of F1"),
            [
                (row["task"], row["variant"], f"{row['runs']}", _spread(row["f1"]),
                 _interval(row["f1"]), _spread(row["accuracy"]), _change(row["change"]))
                for row in rows
            ],
        ),
        note="± is the standard deviation of the runs. Intervals are 95 % bootstraps over test "
        "pictures and runs; the dashed line is the model as it was. Table 1 of the paper.",
        data=[_rows_csv(folder, "answers", ("task",), rows)],
    )  # fmt: skip


def _richness(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    rows = results["richness"]
    if not rows:
        return None
    by_probe = {}
    for row in rows:
        by_probe.setdefault(row["probe"], []).append(row)
    figure = figures.forest(
        {
            f"{probe} probe": {
                task: {v: row["f1"] for v, row in by_variant.items()}
                for task, by_variant in _by(own, "task", "variant").items()
            }
            for probe, own in by_probe.items()
        },
        _hue(rows), "macro-F1 of the probe", against=ORIGINAL,
    )  # fmt: skip
    own = by_probe.get(PAPER, rows)
    equal = (
        f" With one probe for both sides, {_mean(by_probe['matched'], BEFORE)} before and "
        f"{_mean(by_probe['matched'], ORIGINAL)} after it."
        if "matched" in by_probe
        else ""
    )
    return page.Section(
        title="What a probe reads",
        reading=f"The paper's probes reach a macro-F1 of {_mean(own, BEFORE)} before the "
        f"projection, on average over tasks, and after it {_mean(own, ORIGINAL)} in the original "
        f"model, {_mean(own, PROJ)} after {PROJ} and {_mean(own, E2E)} after {E2E}.{equal}",
        figures=[parts.png(folder, "richness", figure, "Macro-F1 of probes by task and variant")],
        table=_pivot(rows, {"probe": "probe", "variant": "features"}),
        note="Features are means over the patches of a picture. The paper's probes have another "
        "depth and width before the projection than after it; the matched probe has the same of "
        "both, and reads as many numbers; the linear one has no depth. In brackets the change "
        "against Original; * marks intervals that exclude zero. Tables 2 and 3 of the paper.",
        data=[_rows_csv(folder, "richness", ("probe", "task"), rows)],
    )  # fmt: skip


def _depth(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    rows = results.get("depth")
    if not rows:
        return None
    curves: dict = {}
    for row in sorted(rows, key=lambda row: row["layer"]):
        by_variant = curves.setdefault(row["tokens"], {}).setdefault(row["task"], {})
        curve = by_variant.setdefault(row["variant"], {"mean": [], "low": [], "high": []})
        for key, values in curve.items():
            values.append(row[key])
    levels = {
        row["task"]: row["f1"]["mean"]
        for row in results["richness"]
        if (row["probe"], row["variant"]) == ("linear", BEFORE)
    }
    names = {"image": "image tokens", "last": "last token"}
    figure = figures.depth(
        {names.get(kind, kind): by_task for kind, by_task in curves.items()},
        _hue(rows), levels, "macro-F1",
    )  # fmt: skip
    columns = ("task", "variant", "tokens", "layer", "mean", "low", "high")
    return page.Section(
        title="Along the depth of the language model",
        reading=" ".join(_rise(names.get(kind, kind), curves[kind]) for kind in curves),
        figures=[parts.png(folder, "depth", figure, "Macro-F1 of a linear probe by layer")],
        note="A linear probe on what leaves each layer; bands are 95 % intervals. The dashed line "
        "is the same probe on the features before the projection.",
        data=[parts.csv(folder, "depth", columns, [[row[c] for c in columns] for row in rows])],
    )


def _rise(kind: str, by_task: Mapping) -> str:
    """Where along the layers most can be read of a kind of token, on average over tasks."""
    found = []
    for variant in (ORIGINAL, PROJ, E2E):
        means = [task[variant]["mean"] for task in by_task.values() if variant in task]
        if means:
            curve = np.mean(means, axis=0)
            found.append(
                f"{variant} {curve[0]:.2f} at layer 0, {curve.max():.2f} at layer "
                f"{curve.argmax()}, {curve[-1]:.2f} at the last"
            )
    return f"At the {kind}: {'; '.join(found)}."


def _factors(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    rows = results.get("factors")
    if not rows:
        return None
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    found = _by(rows, "task", "recipe")
    panels = {
        "model": {
            task: {recipe: row["f1"] for recipe, row in by_recipe.items()}
            for task, by_recipe in found.items()
        },
        "probe after it": {
            task: {recipe: row["probe"] for recipe, row in by_recipe.items() if row["probe"]}
            for task, by_recipe in found.items()
        },
    }
    hue = dict.fromkeys(recipes, figures.PALETTE[0]) | {recipes[0]: figures.GREY}
    figure = figures.forest(
        {group: by_task for group, by_task in panels.items() if any(by_task.values())},
        hue, "macro-F1", against=recipes[0],
    )  # fmt: skip
    largest = max(
        recipes[1:] or recipes,
        key=lambda recipe: abs(_mean_change(rows, recipe)),
    )
    return page.Section(
        title="What the recipe changes",
        reading=f"Against {recipes[0]}, the largest change of the model's F1 is that of {largest}: "
        f"{page.number(_mean_change(rows, largest))} on average over tasks.",
        figures=[parts.png(folder, "factors", figure, "Macro-F1 by recipe and task")],
        table=_pivot(rows, {"recipe": "recipe", "setting": "setting"}),
        note="One factor at a time is set otherwise than in the first recipe. The dashed line is "
        "the first recipe. * marks changes whose interval excludes zero.",
        data=[
            parts.csv(
                folder, "factors",
                ("task", "recipe", "factor", "setting", *VALUE,
                 *(f"change_{c}" for c in CHANGE), *(f"probe_{c}" for c in VALUE)),
                [
                    (row["task"], row["recipe"], row["factor"], row["setting"],
                     *_of(row["f1"], VALUE), *_of(row["change"], CHANGE),
                     *_of(row["probe"], VALUE))
                    for row in rows
                ],
            )
        ],
    )  # fmt: skip


def _mean_change(rows: Sequence[Mapping], recipe: str) -> float:
    changes = [row["change"]["value"] for row in rows
               if row["recipe"] == recipe and row["change"]]  # fmt: skip
    return float(np.mean(changes)) if changes else 0.0


def _neurons(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    rows = results.get("neurons")
    if not rows:
        return None
    by_module: dict = {}
    for row in rows:
        by_task = by_module.setdefault(parts.name(row["module"]), {})
        by_task.setdefault(row["task"], {})[row["variant"]] = row
    figure = figures.migration(by_module, _hue(rows))

    def mean(variant: str, key: str) -> float:
        return float(np.mean([row[key] for row in rows if row["variant"] == variant]))

    variants = list(dict.fromkeys(row["variant"] for row in rows))
    columns = (
        "task", "variant", "module", "before", "after", "kept", "jaccard", "chance",
        "share_before", "share_after",
    )  # fmt: skip
    layers = [
        (*(row[c] for c in columns[:3]), layer, *counts)
        for row in rows
        for layer, counts in enumerate(
            zip(row["per_layer_before"], row["per_layer_after"], strict=True)
        )
    ]
    return page.Section(
        title="Domain neurons before and after",
        reading="A domain's neurons before and after fine-tuning share, by their Jaccard index, "
        + "; ".join(
            f"{mean(v, 'jaccard'):.2f} for {v} (by chance {mean(v, 'chance'):.2f})"
            for v in variants
        )
        + ", on average over tasks and modules.",
        figures=[parts.png(folder, "neurons", figure, "Neurons kept, lost and gained by module")],
        table=page.Table(
            ("task", "variant", "module", "before", "after", "kept", "Jaccard", "share before",
             "share after"),
            [
                (*(row[c] for c in columns[:3]), *(f"{row[c]:,}" for c in columns[3:6]),
                 f"{row['jaccard']:.2f}", _percent(row["share_before"]),
                 _percent(row["share_after"]))
                for row in rows
            ],
        ),
        note="Shares are of the domain's neurons in all modules: where they differ, neurons moved "
        "from module to module.",
        data=[
            parts.csv(folder, "neurons", columns, [[row[c] for c in columns] for row in rows]),
            parts.csv(
                folder, "neurons_per_layer", (*columns[:3], "layer", "before", "after"), layers
            ),
        ],
    )  # fmt: skip


def _ablation(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    rows = [row for row in results.get("ablation", ()) if "called" not in row]
    if not rows:
        return None
    kinds = list(dict.fromkeys(row["off"] for row in rows))
    return page.Section(
        title="Switching neurons off",
        reading="The model's macro-F1 changes, on average over tasks and variants, by "
        + ", by ".join(f"{_mean_off(rows, kind)} with {kind} off" for kind in kinds)
        + ".",
        figures=[
            parts.png(
                folder, "ablation", _changes(rows, "variant"),
                "Change of macro-F1 by whose neurons are off",
            )
        ],
        table=page.Table(
            ("task", "variant", "off", "neurons", "macro-F1", "change of F1"),
            [
                (row["task"], row["variant"], row["off"], f"{row['neurons']:,}",
                 _spread(row["f1"]), _change(row["change"]))
                for row in rows
            ],
        ),
        note="Intervals are paired by picture; * marks those that exclude zero.",
        data=[_off_csv(folder, "ablation", rows)],
    )  # fmt: skip


def _suppression(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    rows = [row for row in results.get("ablation", ()) if "called" in row]
    if not rows:
        return None
    edited = [row for row in rows if row["change"]["value"] or row["neurons"]]
    first, *_ = edited
    changes = ", ".join(f"{row['off']} {page.number(row['change']['value'])}" for row in edited)
    classes = list(first["called"])
    return page.Section(
        title="Suppressing one class",
        reading=f"Two classes ({' and '.join(classes)}), {classes[0]} suppressed. Macro-F1 changes "
        f"by: {changes}.",
        figures=[
            parts.png(folder, "suppression", _changes(edited, ""), "Change of macro-F1 by the edit")
        ],
        table=page.Table(
            ("edit", "neurons", *(f"{name}, called so" for name in classes), "macro-F1",
             "change of F1"),
            [
                (row["off"], f"{row['neurons']:,}",
                 *(_percent(row["called"][name]) for name in classes), _spread(row["f1"]),
                 _change(row["change"]))
                for row in rows
            ],
        ),
        note="AurA (Suau et al. 2024) scales a neuron by 1 less its advantage over chance at "
        "telling the class; experts are the neurons with the largest, switched off.",
        data=[_off_csv(folder, "suppression", rows)],
    )  # fmt: skip


def _changes(rows: Sequence[Mapping], group: str) -> Figure:
    """Changes of F1 by what is off, a row of panels a group."""
    kinds = list(dict.fromkeys(row["off"] for row in rows))
    plain = iter(figures.PALETTE)
    hue = {
        kind: figures.GREY if "random" in kind or "shuffled" in kind else next(plain)
        for kind in kinds
    }
    panels: dict = {}
    for row in rows:
        change = row["change"]
        point = {"mean": change["value"], "low": change["low"], "high": change["high"]}
        by_task = panels.setdefault(row.get(group, ""), {})
        by_task.setdefault(row["task"], {})[row["off"]] = point
    return figures.forest(panels, hue, "change of macro-F1", against="0", shown="{:+.2f}".format)


def _mean_off(rows: Sequence[Mapping], kind: str) -> str:
    changes = [row["change"]["value"] for row in rows if row["off"] == kind]
    return page.number(float(np.mean(changes)))


def _off_csv(folder: pathlib.Path, name: str, rows: Sequence[Mapping]) -> tuple[str, str]:
    classes = list(rows[0].get("called", ()))
    return parts.csv(
        folder, name,
        ("task", "variant", "off", "neurons", *VALUE, *(f"change_{c}" for c in CHANGE),
         *(f"called_{c}" for c in classes)),
        [
            (row["task"], row["variant"], row["off"], row["neurons"], *_of(row["f1"], VALUE),
             *_of(row["change"], CHANGE), *(row["called"][c] for c in classes))
            for row in rows
        ],
    )  # fmt: skip


def _paper(folder: pathlib.Path, results: Mapping) -> page.Section:
    def pair(values: tuple[float, float]) -> str:
        return f"{values[0]:.4f} / {values[1]:.4f}"

    models = [(f"model, {v}", *map(pair, row)) for v, row in projection.TABLE_1.items()]
    before = ("probe, before the projection", *map(pair, projection.TABLE_3))
    after = [(f"probe, {v}", *(f"{f1:.4f}" for f1 in row)) for v, row in projection.TABLE_2.items()]
    return page.Section(
        title="What the paper found",
        reading="LLaVA-1.5-7B on four data sets: fine-tuning raises the model's F1 on every task, "
        "and lowers what a probe reads after the projection.",
        table=page.Table(("macro-F1 / accuracy", *projection.TASKS), [*models, before, *after]),
        note="Verma et al. 2024, Cross-Modal Projection in Multimodal LLMs Doesn't Really Project "
        "Visual Attributes to Textual Space, Tables 1 to 3.",
    )


def _by(rows: Iterable[Mapping], outer: str, inner: str) -> dict[str, dict[str, Mapping]]:
    found: dict = {}
    for row in rows:
        found.setdefault(row[outer], {})[row[inner]] = row
    return found


def _hue(rows: Sequence[Mapping]) -> dict[str, str]:
    """A colour for each variant of the rows, the known ones first and always the same."""
    named = dict.fromkeys(row["variant"] for row in rows)
    others = [name for name in named if name not in FIXED]
    spare = [colour for colour in figures.PALETTE if colour not in FIXED.values()]
    more = dict(zip(others, spare * len(others), strict=False))
    return {name: colour for name, colour in (FIXED | more).items() if name in named}


def _above(row: Mapping) -> bool:
    return bool(row["change"]) and row["change"]["low"] > 0


def _mean(rows: Iterable[Mapping], variant: str) -> str:
    """The mean F1 of a variant over tasks."""
    values = [row["f1"]["mean"] for row in rows if row["variant"] == variant]
    return f"{np.mean(values):.2f}" if values else page.DASH


def _spread(value: Mapping) -> str:
    deviation = value.get("deviation")
    return f"{value['mean']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _interval(value: Mapping) -> str:
    return f"{value['low']:.3f} to {value['high']:.3f}"


def _change(change: Mapping | None) -> str:
    if change is None:
        return page.DASH
    return page.number(change["value"]) + _relative(change)


def _relative(change: Mapping | None) -> str:
    """In brackets, as a share; * where the interval excludes zero. Nothing of no change."""
    if change is None or change["relative"] is None:
        return ""
    star = "*" if change["low"] > 0 or change["high"] < 0 else ""
    return f" ({100 * change['relative']:+.0f} %{star})".replace("-", page.MINUS)


def _pivot(rows: Sequence[Mapping], named: Mapping[str, str]) -> page.Table:
    """F1 and its relative change: a row for each pair of keys, a column a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells: dict = {}
    for row in rows:
        first = tuple(row[key] or page.DASH for key in named)
        cells.setdefault(first, {})[row["task"]] = _spread(row["f1"]) + _relative(row["change"])
    lines = [
        (*first, *(by_task.get(task, page.DASH) for task in tasks))
        for first, by_task in cells.items()
    ]
    return page.Table((*named.values(), *tasks), lines)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _of(values: Mapping | None, keys: Sequence[str]) -> list:
    return [None if values is None else values.get(key) for key in keys]


def _rows_csv(
    folder: pathlib.Path, name: str, first: Sequence[str], rows: Sequence[Mapping]
) -> tuple[str, str]:
    """Rows of `projection.table` with further columns before them."""
    columns = (
        *first, "variant", "runs", "images", *(f"f1_{c}" for c in VALUE),
        *(f"accuracy_{c}" for c in VALUE), *(f"change_{c}" for c in CHANGE),
    )  # fmt: skip
    return parts.csv(
        folder, name, columns,
        [
            (*(row[c] for c in first), row["variant"], row["runs"], row["images"],
             *_of(row["f1"], VALUE), *_of(row["accuracy"], VALUE), *_of(row["change"], CHANGE))
            for row in rows
        ],
    )  # fmt: skip
