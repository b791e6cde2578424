"""Sections of the report on the layers of the language model and on single pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.domain_neurons.report import panels, plots, stage_plots
from mllm_jax.processors import pictures as picture_files
from mllm_jax.report import cards, figures, page, parts
from mllm_jax.report.report import Results
from mllm_jax.typing import Int

Stage = Mapping[str, Any]  # the stages of one curve in results.json
Picture = Mapping[str, Any]  # an entry of `pictures` in results.json
STATISTICS = ("mean", "low", "high")  # of a curve
CURVE = ("domain", "kind", "layer", *STATISTICS)


def lens(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the logit lens by layer; None if not measured."""
    lens, stages = results["lens"], results["stages"]
    if not lens:
        return None
    by_curve = stages["by_domain"] | {
        "all domains": stages["all"], "all, text tokens": stages["text"],
        "number of neurons": stages["neurons"],
    }  # fmt: skip
    kind = token_kinds(lens)[0]
    figure = stage_plots.entropy_curves(lens, stages["by_domain"], stages["all"], staged_kind=kind)
    return page.Section(
        title="Layers and stages",
        reading=_read_lens(lens, stages, kind),
        figures=[
            parts.write_figure(
                folder,
                "lens",
                figure,
                "Entropy of the logit lens by layer, with stage boundaries",
                chart=panels.lens(lens, token_kinds(lens)),
            )
        ],
        table=page.Table(
            ["curve", "second stage from layer", "third from layer", "bends at", "verdict"],
            [
                [name, *_boundaries(stage), _bends(stage), stage["verdict"]]
                for name, stage in by_curve.items()
            ],
        ),
        note="Bands and brackets are 95 % bootstrap intervals over examples. Rule for the "
        f"boundaries: {stages['rule']}. A second rule, the two layers at which the slope "
        "changes most, confirms a boundary (✓) if one lies in its interval or in a layer next to "
        "it. The curve of the number of neurons is that of the language model; its intervals are "
        "over groups of pictures, by resampling them and repeating the selection.",
        data=[_lens_csv(folder, lens), _stages_csv(folder, by_curve)],
    )


def _read_lens(lens: Results, stages: Results, kind: str) -> str:
    """Return the sentences on the entropies and the stages."""
    curve = np.mean([curves[kind]["mean"] for curves in lens.values() if kind in curves], axis=0)
    decided = sum(stage["boundaries"] is not None for stage in stages["by_domain"].values())
    return (
        f"The entropy of {kind} tokens starts at {curve[0]:.1f} nats, is lowest at layer "
        f"{curve.argmin()} ({curve.min():.1f}) and ends at {curve[-1]:.1f}. All domains together: "
        f"{stages['all']['verdict']}; alone, boundaries are decided in {decided} of "
        f"{len(stages['by_domain'])} domains. {_agreement(stages)}"
    )


def _lens_csv(folder: pathlib.Path, lens: Results) -> tuple[str, str]:
    return parts.write_csv(folder, "lens", CURVE, curve_rows(lens))


def curve_rows(lens: Mapping[str, Any]) -> list[list[Any]]:
    """Return the curves of a lens as rows, by CURVE."""
    return [
        [domain, kind, layer, *values]
        for domain, by_kind in lens.items()
        for kind, curve in by_kind.items()
        for layer, values in enumerate(zip(*(curve[s] for s in STATISTICS), strict=True))
    ]


def _stages_csv(folder: pathlib.Path, by_curve: Mapping[str, Stage]) -> tuple[str, str]:
    columns = [
        "domain", "first", "first_low", "first_high", "second", "second_low", "second_high",
        "bends", "verdict",
    ]  # fmt: skip
    rows = [
        [
            name,
            *(
                stage[field][i] if stage[field] else None
                for i in (0, 1)
                for field in ("boundaries", "low", "high")
            ),
            " ".join(map(str, stage["bends"])),
            stage["verdict"],
        ]
        for name, stage in by_curve.items()
    ]
    return parts.write_csv(folder, "stages", columns, rows)


def _boundaries(stage: Stage) -> list[str]:
    """Return the two boundaries of a curve with their intervals, as text."""
    if stage["boundaries"] is None:
        return [page.DASH, page.DASH]
    intervals = zip(stage["boundaries"], stage["low"], stage["high"], strict=True)
    marks = [" ✓" if confirmed else "" for confirmed in stage["confirmed"]]
    return [
        f"{boundary} [{low}, {high}]{mark}"
        for (boundary, low, high), mark in zip(intervals, marks, strict=True)
    ]


def _bends(stage: Stage) -> str:
    return ", ".join(map(str, stage["bends"])) or page.DASH


def _agreement(stages: Results) -> str:
    """Return whether the stages of entropies and of numbers of neurons are the same layers."""
    agreement = stages["agreement"]
    if agreement is None:
        return "Whether the number of neurons changes at the same layers is undecided."
    subjects = {2: "Both boundaries", 1: "One of the two boundaries", 0: "Neither boundary"}
    return f"{subjects[sum(agreement)]} meets one in the number of neurons by layer."


def words(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on mean distributions over words; None if not measured."""
    rows = results["lens_words"]
    if not rows:
        return None
    kinds, last = sorted({row["tokens"] for row in rows}), max(row["layer"] for row in rows)
    shown = [row for row in rows if row["layer"] == last]
    firsts = [
        f"{row['data']} “{figures.printable(row['words'][0])}” "
        f"({parts.percent(row['probabilities'][0])})"
        for row in shown
        if row["tokens"] == "image"
    ]
    return page.Section(
        title="Next words on average",
        reading="The distribution of the next word after the last layer, averaged over image "
        f"tokens, is highest at {parts.join_words(firsts)}." if firsts else "",
        table=page.Table(
            ["domain", "tokens", "words after the last layer, by mean probability"],
            [[row["data"], row["tokens"], _probable(row)] for row in shown],
        ),
        note=f"The mean over {parts.join_words(kinds)} tokens of the lens's probabilities of all "
        "words; the table file has more of them, and earlier layers. ␣ is white space, ↵ a line "
        "break.",
        data=[_words_csv(folder, rows)],
    )  # fmt: skip


def _probable(row: Mapping[str, Any], count: int = 5) -> str:
    """Return the most probable words of a mean distribution with their probabilities."""
    pairs = zip(row["words"], row["probabilities"], strict=True)
    return ", ".join(f"{figures.printable(w)} {p:.3f}" for w, p in list(pairs)[:count])


def _words_csv(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    table = [
        [row["data"], row["tokens"], row["layer"], rank, word, probability]
        for row in rows
        for rank, (word, probability) in enumerate(
            zip(row["words"], row["probabilities"], strict=True), 1
        )
    ]
    columns = ["data", "tokens", "layer", "rank", "word", "probability"]
    return parts.write_csv(folder, "lens_words", columns, table)


def features(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the clusters of pictures by domain; None if not measured."""
    by_module = results["features"]
    if not by_module:
        return None
    shares = [
        f"{parts.percent(features['between'])} in the {parts.title(module).lower()}"
        for module, features in by_module.items()
    ]
    figure = plots.scatter({parts.title(module): of for module, of in by_module.items()})
    rows = [
        [module, domain, *point]
        for module, features in by_module.items()
        for domain, points in features["points"].items()
        for point in points
    ]
    return page.Section(
        title="Clusters of pictures by domain",
        reading=f"Differences between domains are {parts.join_words(shares)} of all variance among "
        "the mean features of pictures.",
        figures=[
            parts.write_figure(
                folder, "features", figure,
                "Two principal components of the pictures' features, by domain",
                chart=panels.features(by_module),
            )
        ],
        note="The mean over the image tokens of each picture, after the vision encoder and after "
        "the projector, on the first two principal components.",
        data=[
            parts.write_csv(folder, "features", ["module", "domain", "first", "second"], rows)
        ],
    )  # fmt: skip


def pictures(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on single pictures and their image tokens; None if there are none."""
    pictures = results["pictures"]
    if not pictures:
        return None
    every = [np.asarray(picture["entropy"]) for picture in pictures]
    bounds = min(float(e.min()) for e in every), max(float(e.max()) for e in every)
    drawn = [_full_picture(folder, i, picture, bounds) for i, picture in enumerate(pictures)]
    drawn += [_split_picture(folder, i, p) for i, p in enumerate(pictures) if p["parts"]]
    first, last = (np.mean([np.mean(p["entropy"][i]) for p in pictures]) for i in (0, -1))
    return page.Section(
        title="Words on the picture",
        reading="The most likely word of a logit lens at each image token. From layer "
        f"{pictures[0]['layers'][0]} to layer {pictures[0]['layers'][-1]} the mean entropy goes "
        f"from {first:.1f} to {last:.1f} nats.",
        figures=drawn,
        data=_picture_page(folder, pictures),
        note="The lower the entropy, the deeper the colour, on one scale for all "
        "pictures. ↵ is a line break, ␣ white space, ▯ a character that the font lacks; long "
        "words are truncated. The picture is the input of the vision encoder; if it is also read "
        "in parts, the entropies of their tokens follow.",
    )


def _picture_page(folder: pathlib.Path, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Write the page on which each picture has a slider over the layers, and return its link."""
    shades = {
        "entropy": "entropy, nats",
        "attention": "attention of the last token",
        "attribution": "attribution of the first generated word",
    }

    def section(number: int, picture: Picture) -> page.Section:
        layers, title = picture["by_layer"], f"{picture['domain']}, {picture['id']}"
        words = cards.WordMap(
            picture["image"], title, layers["layers"],
            (len(picture["words"][0]), len(picture["words"][0][0])), layers["vocabulary"],
            layers["words"], {name: layers[key] for key, name in shades.items() if layers[key]},
        )  # fmt: skip
        return page.Section(
            title=title,
            reading=_describe(picture),
            widgets=[words],
            name=f"picture-{number}",
            alone=True,
        )

    content = page.Page(
        title="Single pictures",
        lead="The words that a logit lens reads at each image token, layer by layer. Point at a "
        "patch, or use the arrow keys, to see its most likely words.",
        sections=[section(*numbered) for numbered in enumerate(pictures)],
        data=[("back to the study", "index.html"), ("all pictures", "pictures.html")],
    )
    page.write(folder / "pictures.html", content)
    return [("each picture, layer by layer", "pictures.html")]


def _describe(picture: Picture) -> str:
    """Return the question on a picture, the expected answer and what the model generated."""
    return (
        f"Question: {picture['question']} Expected: {picture['answer']}. "
        f"Generated: {picture['generated']}"
    )


def _full_picture(
    folder: pathlib.Path, number: int, picture: Picture, bounds: tuple[float, float]
) -> page.Figure:
    """Draw the tokens of the full picture at all layers that were read, on a common scale."""
    figure = figures.token_map(
        read_picture(folder, picture), picture["words"], picture["entropy"],
        [f"layer {layer}" for layer in picture["layers"]], bounds,
    )  # fmt: skip
    caption = f"{picture['domain']}, {picture['id']}. {_describe(picture)}"
    alt = f"Most likely word of each image token of {picture['id']}"
    return parts.write_figure(folder, f"tokens-{number}", figure, alt, caption)


def _split_picture(folder: pathlib.Path, number: int, picture: Picture) -> page.Figure:
    """Draw the tokens of a picture's parts, in the first and the last of the layers."""
    ends = (0, -1)
    figure = figures.token_map(
        read_picture(folder, {**picture, "image": picture["original"]}),
        [picture["parts"]["words"][i] for i in ends],
        np.array([picture["parts"]["entropy"][i] for i in ends]),
        [f"parts, layer {picture['layers'][i]}" for i in ends],
    )
    alt = f"Entropy of the image tokens of the parts of {picture['id']}"
    return parts.write_figure(
        folder, f"parts-{number}", figure, alt, f"The parts of {picture['id']}."
    )


def token_kinds(by_name: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the token kinds of {name: {kind: ...}}, images first."""
    kinds = dict.fromkeys(kind for by_kind in by_name.values() for kind in by_kind)
    return sorted(kinds, key=lambda kind: kind != "image")


def read_picture(folder: pathlib.Path, picture: Picture) -> Int[np.ndarray, "row column 3"]:
    """Read the picture that an entry of the results names."""
    path = folder / picture["image"]
    if not path.exists():
        raise FileNotFoundError(
            f"picture of {picture['id']} is missing: {path}; run the study again"
        )
    return np.asarray(picture_files.read(path))
