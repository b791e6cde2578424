"""The report of the domain-neuron study: figures, tables and a page from its results.json.

`write` is a pure function of the results and of the pictures they name: it can be run again at any
time and leaves the same bytes.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from mllm_jax.processors import pictures as picture_files
from mllm_jax.report import evidence, figures, page, parts

LEVEL = 0.05  # of tests, after their correction
CHOSEN = {
    "entropy": "Selected are the neurons whose probability of being active, normalised over the "
    "domains, has the lowest entropy (DAPE), among those that are often active in some domain.",
    "given": "The neurons come from a file.",
    "other": "Selected are the best neurons of each domain by another selector, as many as the "
    "entropy (DAPE) takes.",
}
KEYS = (
    "model", "domains", "modules", "tokens", "selection", "steadiness", "comparison", "baseline",
    "ablation", "against_random", "lens", "stages", "features", "pictures",
)  # fmt: skip


def write(workdir: str | os.PathLike, results: Mapping) -> None:
    """Writes figures/*.png, tables/*.csv and, last of all, index.html.

    Args:
        workdir: the study's folder, which holds the pictures that the results name.
        results: what results.json holds. A part that is empty has no section on the page.
    """
    parts.require(results, KEYS, "domain_neurons")
    folder = pathlib.Path(workdir)
    made = (
        _accuracy, _neurons, _overlap, evidence.steadiness, evidence.comparison, _ablation,
        _deviation, _lens, evidence.features, _pictures,
    )  # fmt: skip
    sections = [section for part in made if (section := part(folder, results))]
    content = page.Page(
        title="Domain-specific neurons",
        lead=f"Which neurons of {page.edited(results)} fire in one visual domain and hardly in the "
        "others, what happens when they are switched off, and what image tokens say on their way "
        f"up? Domains: {parts.listed(results['domains'])}.",
        facts=_facts(results),
        figure=_overview(folder, results),
        sections=sections,
        data=page.RECORDS,
    )
    page.write(folder / "index.html", content)


def _facts(results: Mapping) -> list[tuple[str, str]]:
    chosen = sum(found["selected"] for found in results["selection"].values())
    of = sum(shape["layers"] * shape["width"] for shape in results["modules"].values())
    tokens = sum(sum(by_domain.values()) for by_domain in results["tokens"].values())
    questions = sum(score["n"] for score in results["baseline"].values())
    facts = [
        (f"{len(results['domains'])}", "domains"),
        (f"{tokens:,}", "tokens counted"),
        (f"{chosen:,}", f"of {of:,} neurons selected"),
        (f"{questions:,}", "test questions"),
        (f"{len(results['ablation']):,}", "ablation runs"),
    ]
    return [fact for fact in facts if fact[0] != "0"]


def _overview(folder: pathlib.Path, results: Mapping) -> page.Figure | None:
    module, lens = _widest(results), results["lens"]
    if module is None or not lens:
        return None
    kind, name = _kinds(lens)[0], parts.name(module).lower()
    tokens = None
    if results["pictures"]:
        shown = results["pictures"][0]
        title = f"Image tokens at layer {shown['layers'][-1]}"
        tokens = (_picture(folder, shown), shown["words"][-1], shown["entropy"][-1], title)
    figure = figures.overview(
        tokens,
        {domain: curves[kind] for domain, curves in lens.items() if kind in curves},
        results["stages"]["all"],
        *_matrix(results, module, control=False),
        {"curves": f"Entropy of {kind} tokens", "matrix": f"Accuracy change, {name}"},
    )
    words = (
        "Left: image tokens, the surer the lens the deeper, with its most likely word where there "
        "is room. Then: e"
    )
    return parts.png(
        folder,
        "overview",
        figure,
        "Words read from image tokens, entropy by layer, and the ablation matrix",
        f"{words if tokens else 'E'}ntropy of the logit lens by layer and domain, with stage "
        f"boundaries. Right: change of accuracy, in points, with a domain's neurons off in {name}; "
        "* marks changes beyond chance.",
    )


def _accuracy(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    baseline = results["baseline"]
    if not baseline:
        return None
    columns = ["accuracy", "low", "high", "chance", "n", "metric"]
    rows = [[domain, *(score[c] for c in columns)] for domain, score in baseline.items()]
    guessed = {d: score for d, score in baseline.items() if score["chance"] is not None}
    above = sum(score["low"] > score["chance"] for score in guessed.values())
    beats = f"beats chance in {above} of {len(guessed)} domains; it " if guessed else ""
    metrics = dict.fromkeys(score["metric"] for score in baseline.values())

    def extreme(pick: Callable) -> str:
        domain = pick(baseline, key=lambda d: baseline[d]["accuracy"])
        score = baseline[domain]
        chance = f", chance {parts.percent(score['chance'])}" if domain in guessed else ""
        return f"{domain} ({parts.percent(score['accuracy'])}{chance})"

    return page.Section(
        title="The model answers",
        reading=f"Unedited, the model {beats}is best in {extreme(max)} and worst in "
        f"{extreme(min)}.",
        figures=[
            parts.png(
                folder,
                "accuracy",
                figures.accuracy(baseline),
                "Accuracy of each domain, its interval, and chance",
            )
        ],
        note=f"Measured: {parts.listed(list(metrics))}. Bars are 95 % bootstrap intervals over "
        "questions. Chance is what a guess among the options gives; a domain beats it if its "
        "interval lies above.",
        data=[parts.csv(folder, "accuracy", ["domain", *columns], rows)],
    )


def _neurons(folder: pathlib.Path, results: Mapping) -> page.Section:
    selection, modules, domains = results["selection"], results["modules"], results["domains"]
    shape, chosen = ["site", "layers", "width"], ["k", "threshold", "bar", "selected", "share"]
    selected_rows = [
        [module, *(modules[module][c] for c in shape), *(_one(found[c]) for c in chosen)]
        for module, found in selection.items()
    ]
    layer_rows = [
        [module, domain, layer, count]
        for module, found in selection.items()
        for domain, counts in found["per_layer"].items()
        for layer, count in enumerate(counts)
    ]
    token_rows = [
        [module, domain, count]
        for module, by_domain in results["tokens"].items()
        for domain, count in by_domain.items()
    ]
    table = [
        [
            parts.name(module),
            f"{modules[module]['layers'] * modules[module]['width']:,}",
            f"{found['selected']:,}",
            f"{100 * found['share']:.2f} %",
            *(f"{found['neurons_per_domain'][domain]:,}" for domain in domains),
        ]
        for module, found in selection.items()
    ]
    figure = figures.neurons_per_layer(
        {parts.name(module): found["per_layer"] for module, found in selection.items()},
        {
            parts.name(
                module
            ): f"{size['site']} · {size['layers']} \N{MULTIPLICATION SIGN} {size['width']:,}"
            for module, size in modules.items()
        },
    )
    deepest = max(selection, key=lambda module: modules[module]["layers"])
    totals = {d: sum(s["neurons_per_domain"][d] for s in selection.values()) for d in domains}
    most, least = max(totals, key=totals.get), min(totals, key=totals.get)
    return page.Section(
        title="Where the neurons are",
        reading=f"{_thirds(selection[deepest], parts.name(deepest).lower())} Most neurons belong "
        f"to {most} ({totals[most]:,}), fewest to {least} ({totals[least]:,}).",
        figures=[
            parts.png(folder, "neurons", figure, "Neurons of each domain by module and layer")
        ],
        table=page.Table(["module", "neurons", "selected", "share", *domains], table),
        note=f"{CHOSEN.get(results['selector'], CHOSEN['other'])} A neuron "
        "belongs to every domain in which it passes the bar, so the domains may add up to "
        "more than the selection.",
        data=[
            parts.csv(folder, "selection", ["module", *shape, *chosen], selected_rows),
            parts.csv(
                folder, "neurons_per_layer", ["module", "domain", "layer", "neurons"], layer_rows
            ),
            parts.csv(folder, "tokens", ["module", "domain", "tokens"], token_rows),
        ],
    )


def _one(value) -> object:
    """A number as it is; those of layers side by side."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _thirds(found: Mapping, name: str) -> str:
    """How the neurons of a module lie over its layers."""
    counts = np.array(list(found["per_layer"].values())).sum(axis=0)
    if not counts.sum():
        return f"The {name} has no domain-specific neuron."
    first, middle, last = (
        parts.percent(part.sum() / counts.sum()) for part in np.array_split(counts, 3)
    )
    return (
        f"In the {name}, {first} of the domain-specific neurons lie in the first third of the "
        f"layers, {middle} in the middle and {last} in the last; the peak is "
        f"layer {counts.argmax()}."
    )


def _overlap(folder: pathlib.Path, results: Mapping) -> page.Section:
    selection, domains = results["selection"], results["domains"]
    pairs = [
        [module, first, domains[j], found["overlap"][i][j]]
        for module, found in selection.items()
        for i, first in enumerate(domains)
        for j in range(i + 1, len(domains))
    ]
    counts = {
        module: [found["domains_per_neuron"].get(str(n), 0) for n in range(len(domains) + 1)]
        for module, found in selection.items()
    }
    figure = figures.overlap(
        {parts.name(module): np.array(found["overlap"]) for module, found in selection.items()},
        {parts.name(module): count for module, count in counts.items()},
        domains,
    )
    one = sum(count[1] for count in counts.values())
    every = max(1, sum(found["selected"] for found in selection.values()))
    module, first, second, value = max(pairs, key=lambda pair: pair[3])
    return page.Section(
        title="How domains share neurons",
        reading=f"{parts.percent(one / every)} of the selected neurons belong to exactly one "
        f"domain; the closest pair is {first} and {second} in the {parts.name(module).lower()}, "
        f"with a Jaccard index of {value:.2f}.",
        figures=[
            parts.png(
                folder, "overlap", figure, "Overlap of domains, and number of domains per neuron"
            )
        ],
        note="The Jaccard index is the share of common neurons among the neurons of either domain.",
        data=[
            parts.csv(folder, "overlap", ["module", "domain", "other", "jaccard"], pairs),
            parts.csv(
                folder,
                "domains_per_neuron",
                ["module", "domains", "neurons"],
                [[module, n, c] for module, count in counts.items() for n, c in enumerate(count)],
            ),
        ],
    )


def _ablation(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    runs = results["ablation"]
    if not runs:
        return None
    columns = [
        "module", "mask", "data", "neurons", "control", "accuracy", "difference", "low", "high",
        "p", "p_holm",
    ]  # fmt: skip
    modules = list(dict.fromkeys(run["module"] for run in runs))
    selected = {module: _matrix(results, module, control=False) for module in modules}
    control = {module: _matrix(results, module, control=True)[0] for module in modules}
    draws = len({run["control"] for run in runs} - {None})
    figure = figures.ablation_matrix(
        {parts.name(module): change for module, (change, _) in selected.items()},
        {parts.name(module): change for module, change in control.items() if draws},
        {parts.name(module): star for module, (_, star) in selected.items()},
        results["domains"],
        "random neurons off" + (f"\n(mean of {draws} draws)" if draws > 1 else ""),
    )

    own = np.eye(len(results["domains"]), dtype=bool)
    rows = [
        [
            parts.name(module),
            *(parts.points(values) for values in (change[own], change[~own])),
            *(parts.points(values) for values in (control[module][own], control[module][~own])),
            *(f"{star[of].sum()} of {(~np.isnan(change[of])).sum()}" for of in (own, ~own)),
        ]
        for module, (change, star) in selected.items()
    ]
    module = _widest(results)
    change, star = selected[module]
    measured = (~np.isnan(change[own])).sum()
    random = f" (as many random neurons: {parts.points(control[module][own])})" if draws else ""
    return page.Section(
        title="Switching them off",
        reading=f"With its own neurons off in {parts.name(module).lower()}, accuracy on a domain "
        f"changes by {parts.points(change[own])} points on average{random}, on other domains by "
        f"{parts.points(change[~own])}; the change is beyond chance in {star[own].sum()} of "
        f"{measured} domains{_beyond_random(results, module)}.",
        figures=[parts.png(folder, "ablation", figure, "Accuracy change by mask, data and module")],
        table=page.Table(
            [
                "module", "own domain, points", "other domains", "random, own", "random, others",
                "own beyond chance", "others beyond chance",
            ],
            rows,
        ),
        note="Rows: the domain whose neurons are set to zero, at every token and every step. "
        "Columns: the domain tested. Random neurons match in number, layer and module. Beyond "
        f"chance: p below {LEVEL} by flipping signs of paired differences, corrected for the "
        "number of cells (Holm). The intervals in the table files are 95 % paired bootstrap "
        "intervals over questions, one by one: one may leave out zero where p, corrected, does "
        "not fall below the level.",
        data=[
            parts.csv(folder, "ablation", columns, [[run.get(c) for c in columns] for run in runs]),
            *_against(folder, results),
        ],
    )  # fmt: skip


def _beyond_random(results: Mapping, module: str) -> str:
    """How often a domain's own neurons matter otherwise than random ones."""
    rows = [row for row in results["against_random"] if row["module"] == module]
    if not rows:
        return ""
    beyond = sum(row["p_holm"] <= LEVEL for row in rows)
    return f", and other than that of random neurons in {beyond} of {len(rows)}"


def _against(folder: pathlib.Path, results: Mapping) -> list[tuple[str, str]]:
    rows = results["against_random"]
    columns = ["module", "data", "difference", "low", "high", "p", "p_holm"]
    cells = [[row[c] for c in columns] for row in rows]
    return [parts.csv(folder, "against_random", columns, cells)] if rows else []


def _deviation(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    runs = [run for run in results["ablation"] if run["deviation"]]
    own = [run for run in runs if run["mask"] == run["data"] and run["control"] is None]
    random = [run for run in runs if run["mask"] == run["data"] and run["control"] is not None]
    if not own:
        return None
    measures = {"relative_l2": "relative L2", "cosine": f"1 {page.MINUS} cosine"}
    columns = ["module", "mask", "data", "control"]
    all_rows = [
        [*(run[c] for c in columns), kind, *(moved[measure] for measure in measures)]
        for run in runs
        for kind, moved in run["deviation"].items()
    ]
    selected, control = _moved(own), _moved(random)
    figure = figures.deviation(selected, control, measures)

    def mean(source: Mapping, module: str, kind: str, measure: str) -> str:
        values = [m[measure] for m in source.get(module, {}).get(kind, {}).values()]
        return parts.small(np.mean(values)) if values else page.DASH

    rows = [
        [
            module,
            kind,
            *(mean(source, module, kind, m) for m in measures for source in (selected, control)),
        ]
        for module, by_kind in selected.items()
        for kind in by_kind
    ]
    module, kind = parts.name(_widest(results)), _kinds(selected)[0]
    moved, by_chance = (mean(s, module, kind, "relative_l2") for s in (selected, control))
    return page.Section(
        title="How far hidden states move",
        reading=f"Switching off a domain's own neurons ({module.lower()}) moves the hidden states "
        f"of {kind} tokens by {moved} of their norm; random neurons, by {by_chance}.",
        figures=[
            parts.png(
                folder, "deviation", figure, "Hidden-state deviation by module and token kind"
            )
        ],
        table=page.Table(
            ["module", "tokens", "relative L2", "random", f"1 {page.MINUS} cosine", "random"], rows
        ),
        note="Each domain tested on its own data; means over tokens and, for random neurons, over "
        "draws. The scale is logarithmic.",
        data=[parts.csv(folder, "deviation", [*columns, "kind", *measures], all_rows)],
    )


def _moved(runs: Iterable[Mapping]) -> dict:
    """Mean over runs: {module name: {kind: {domain: {measure: float}}}}."""
    gathered: dict[tuple, list[float]] = {}
    for run in runs:
        for kind, moved in run["deviation"].items():
            for measure, value in moved.items():
                gathered.setdefault((run["module"], kind, run["data"], measure), []).append(value)
    means: dict = {}
    for (module, kind, domain, measure), values in gathered.items():
        by_domain = means.setdefault(parts.name(module), {}).setdefault(kind, {})
        by_domain.setdefault(domain, {})[measure] = float(np.mean(values))
    return means


def _lens(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    lens, stages = results["lens"], results["stages"]
    if not lens:
        return None
    curve_rows = [
        [domain, kind, layer, *values]
        for domain, by_kind in lens.items()
        for kind, curve in by_kind.items()
        for layer, values in enumerate(
            zip(*(curve[c] for c in ("mean", "low", "high")), strict=True)
        )
    ]
    found = stages["by_domain"] | {
        "all domains": stages["all"], "all, text tokens": stages["text"],
        "number of neurons": stages["neurons"],
    }  # fmt: skip
    stage_rows = [
        [
            name,
            *(
                stage[c][i] if stage[c] else None
                for i in (0, 1)
                for c in ("boundaries", "low", "high")
            ),
            " ".join(map(str, stage["bends"])),
            stage["verdict"],
        ]
        for name, stage in found.items()
    ]
    kind = _kinds(lens)[0]
    figure = figures.entropy_curves(lens, stages["by_domain"], stages["all"], staged_kind=kind)
    curve = np.mean([curves[kind]["mean"] for curves in lens.values() if kind in curves], axis=0)
    decided = sum(stage["boundaries"] is not None for stage in stages["by_domain"].values())
    return page.Section(
        title="Layers and stages",
        reading=f"The entropy of {kind} tokens starts at {curve[0]:.1f} nats, is lowest at layer "
        f"{curve.argmin()} ({curve.min():.1f}) and ends at {curve[-1]:.1f}. All domains together: "
        f"{stages['all']['verdict']}; alone, boundaries are decided in {decided} of "
        f"{len(stages['by_domain'])} domains. {_agreement(stages)}",
        figures=[
            parts.png(
                folder,
                "lens",
                figure,
                "Entropy of the logit lens by layer, with stage boundaries",
            )
        ],
        table=page.Table(
            ["curve", "second stage from layer", "third from layer", "bends at", "verdict"],
            [
                [name, *_boundaries(stage), _bends(stage), stage["verdict"]]
                for name, stage in found.items()
            ],
        ),
        note="Bands and brackets are 95 % bootstrap intervals over examples. Rule for the "
        f"boundaries: {stages['rule']}. A second rule, the two layers at which the slope "
        "changes most, confirms a boundary (✓) if one lies in its interval or a layer beside it. "
        "The curve of the number of neurons is that of the language model; its intervals are over "
        "domains, of which it takes five.",
        data=[
            parts.csv(
                folder, "lens", ["domain", "kind", "layer", "mean", "low", "high"], curve_rows
            ),
            parts.csv(
                folder,
                "stages",
                [
                    "domain", "first", "first_low", "first_high", "second", "second_low",
                    "second_high", "bends", "verdict",
                ],
                stage_rows,
            ),
        ],
    )  # fmt: skip


def _boundaries(stage: Mapping) -> list[str]:
    if stage["boundaries"] is None:
        return [page.DASH, page.DASH]
    triples = zip(stage["boundaries"], stage["low"], stage["high"], strict=True)
    marks = [" ✓" if sure else "" for sure in stage["confirmed"]]
    return [
        f"{boundary} [{low}, {high}]{mark}"
        for (boundary, low, high), mark in zip(triples, marks, strict=True)
    ]


def _bends(stage: Mapping) -> str:
    return ", ".join(map(str, stage["bends"])) or page.DASH


def _agreement(stages: Mapping) -> str:
    """Whether entropies and numbers of neurons speak of the same layers."""
    meet = stages["agreement"]
    if meet is None:
        return "Whether the number of neurons changes at the same layers is undecided."
    words = {2: "Both boundaries", 1: "One of the two boundaries", 0: "Neither boundary"}
    return f"{words[sum(meet)]} meets one in the number of neurons by layer."


def _pictures(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    pictures = results["pictures"]
    if not pictures:
        return None
    drawn = [
        parts.png(
            folder,
            f"tokens-{i}",
            figures.token_map(
                _picture(folder, shown),
                shown["words"],
                shown["entropy"],
                [f"layer {layer}" for layer in shown["layers"]],
            ),
            f"Most likely word of each image token of {shown['id']}",
            f"{shown['domain']}, {shown['id']}. Question: {shown['question']} "
            f"Expected: {shown['answer']}. Generated: {shown['generated']}",
        )
        for i, shown in enumerate(pictures)
    ] + [_finer(folder, i, shown) for i, shown in enumerate(pictures) if shown["parts"]]
    first, last = (np.mean([np.mean(shown["entropy"][i]) for shown in pictures]) for i in (0, -1))
    return page.Section(
        title="Words on the picture",
        reading="The word that a logit lens finds most likely at each image token. From layer "
        f"{pictures[0]['layers'][0]} to layer {pictures[0]['layers'][-1]} the mean entropy goes "
        f"from {first:.1f} to {last:.1f} nats.",
        figures=drawn,
        note="The surer the lens, the deeper the colour. ↵ is a line break, ␣ white space, ▯ a "
        "sign that the font lacks; long words are cut. The picture is what the vision encoder is "
        "given; where it is also read in parts, their tokens follow, by their entropy.",
    )


def _finer(folder: pathlib.Path, number: int, shown: Mapping) -> page.Figure:
    """The tokens of a picture's parts, at the first and the last of the layers."""
    ends = (0, -1)
    figure = figures.token_map(
        _picture(folder, shown | {"image": shown["original"]}),
        [shown["parts"]["words"][i] for i in ends],
        [shown["parts"]["entropy"][i] for i in ends],
        [f"parts, layer {shown['layers'][i]}" for i in ends],
    )
    alt = f"Entropy of the image tokens of the parts of {shown['id']}"
    return parts.png(folder, f"parts-{number}", figure, alt, f"The parts of {shown['id']}.")


def _matrix(results: Mapping, module: str, *, control: bool) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy differences (the mean over draws, for controls), and which are beyond chance."""
    place = {domain: i for i, domain in enumerate(results["domains"])}
    shape = (len(place), len(place))
    total, runs, star = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for run in results["ablation"]:
        if run["module"] == module and (run["control"] is not None) == control:
            cell = place[run["mask"]], place[run["data"]]
            total[cell] += run["difference"]
            runs[cell] += 1
            star[cell] = not control and run["p_holm"] <= LEVEL
    return np.divide(total, runs, out=np.full(shape, np.nan), where=runs > 0), star


def _widest(results: Mapping) -> str | None:
    """The module whose ablation says most: all of them together, if that was run."""
    modules = [run["module"] for run in results["ablation"]]
    return "all" if "all" in modules else modules[-1] if modules else None


def _kinds(by_name: Mapping[str, Mapping]) -> list[str]:
    """The token kinds of {name: {kind: ...}}, images first."""
    kinds = dict.fromkeys(kind for by_kind in by_name.values() for kind in by_kind)
    return sorted(kinds, key=lambda kind: kind != "image")


def _picture(folder: pathlib.Path, shown: Mapping) -> np.ndarray:
    path = folder / shown["image"]
    if not path.exists():
        raise FileNotFoundError(f"picture of {shown['id']} is missing: {path}; run the study again")
    return np.asarray(picture_files.read(path))
