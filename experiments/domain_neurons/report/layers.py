"""Sections of the report on the layers of the language model and on single pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.domain_neurons.report import plots, stage_plots
from mllm_jax.processors import pictures as picture_files
from mllm_jax.report import figures, page, parts


def lens(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Build the section on the logit lens by layer; None where not measured."""
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
    kind = token_kinds(lens)[0]
    figure = stage_plots.entropy_curves(lens, stages["by_domain"], stages["all"], staged_kind=kind)
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


def features(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Do pictures of a domain lie together, before and after the projector?"""
    found = results["features"]
    if not found:
        return None
    shares = parts.listed(
        [
            f"{parts.percent(of['between'])} in the {parts.name(m).lower()}"
            for m, of in found.items()
        ]
    )
    return page.Section(
        title="Pictures of a domain lie together",
        reading=f"Differences between domains are {shares} of all variance among the mean features "
        "of pictures.",
        figures=[
            parts.png(
                folder, "features", plots.scatter({parts.name(m): of for m, of in found.items()}),
                "Two principal components of the pictures' features, by domain",
            )
        ],
        note="The mean over the image tokens of each picture, as the vision encoder and as the "
        "projector gives it, on the two directions in which pictures vary most.",
        data=[
            parts.csv(
                folder, "features", ["module", "domain", "first", "second"],
                [
                    [module, domain, *point]
                    for module, of in found.items()
                    for domain, points in of["points"].items()
                    for point in points
                ],
            )
        ],
    )  # fmt: skip


def pictures(folder: pathlib.Path, results: Mapping) -> page.Section | None:
    """Build the section on single pictures and their image tokens; None where there are none."""
    pictures = results["pictures"]
    if not pictures:
        return None
    drawn = [
        parts.png(
            folder,
            f"tokens-{i}",
            figures.token_map(
                read_picture(folder, shown),
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
        read_picture(folder, shown | {"image": shown["original"]}),
        [shown["parts"]["words"][i] for i in ends],
        [shown["parts"]["entropy"][i] for i in ends],
        [f"parts, layer {shown['layers'][i]}" for i in ends],
    )
    alt = f"Entropy of the image tokens of the parts of {shown['id']}"
    return parts.png(folder, f"parts-{number}", figure, alt, f"The parts of {shown['id']}.")


def token_kinds(by_name: Mapping[str, Mapping]) -> list[str]:
    """The token kinds of {name: {kind: ...}}, images first."""
    kinds = dict.fromkeys(kind for by_kind in by_name.values() for kind in by_kind)
    return sorted(kinds, key=lambda kind: kind != "image")


def read_picture(folder: pathlib.Path, shown: Mapping) -> np.ndarray:
    """Read the picture that a result names, as uint8[row, column, 3]."""
    path = folder / shown["image"]
    if not path.exists():
        raise FileNotFoundError(f"picture of {shown['id']} is missing: {path}; run the study again")
    return np.asarray(picture_files.read(path))
