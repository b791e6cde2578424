"""The report of the lens study: figures, tables and a page."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm_jax.report import charts, figures, learning, page, parts, style, tables

Results = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
LABELS = {
    "kl": "KL, nats",
    "entropy": "entropy, nats",
    "agrees": "agreement with the final word",
}
TITLES = {"kl": "KL from the model's own distribution", "entropy": "Entropy", "agrees": "Agreement"}
KEYS = {"at": "layer", "mean": "value", "low": "low", "high": "high"}
COLUMNS = ("lens", "domain", "measure", "kind", "layer", "value", "low", "high", "pictures")


@style.styled
def by_layer(panels: Mapping[str, Rows], by: str, label: str) -> Figure:
    """Draw curves by layer with their intervals, one panel per title.

    Args:
      panels: {title: rows}.
      by: The field that names the curve of a row.
      label: The label of the vertical axis.
    """
    figure = Figure(figsize=(5.5 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        _draw(ax, charts.curves_of(rows, by, KEYS))
        ax.set(title=title, xlabel="layer")
    axes[0].set_ylabel(label)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _draw(ax: Axes, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    for (name, curve), colour in zip(curves.items(), style.palette(list(curves)).values()):
        ax.fill_between(
            curve["at"], curve["low"], curve["high"], color=colour, alpha=0.16, linewidth=0
        )
        ax.plot(curve["at"], curve["mean"], "o-", markersize=3.5, color=colour, label=name)
    ax.grid(axis="y")


def write(workdir: str | os.PathLike, results: Results, losses: Mapping[str, np.ndarray]) -> None:
    """Write the figures, the tables and index.html.

    Args:
      workdir: The folder of the study.
      results: The content of results.json.
      losses: The loss of each step of the tuned lens, by layer.
    """
    folder = pathlib.Path(workdir)
    every = results["curves"]
    tables.write(folder / "tables/curves.csv", COLUMNS, [[r[c] for c in COLUMNS] for r in every])
    columns = [column for column in COLUMNS if column != "domain"]
    tables.write(
        folder / "tables/beyond_logit.csv", columns,
        [[row[c] for c in columns] for row in results["beyond_logit"]],
    )  # fmt: skip
    sections = [_measure(folder, results, measure) for measure in LABELS]
    sections += [_domains(folder, results), *_nearest(folder, results), *_words(folder, results)]
    content = page.Page(
        title="What lenses read, layer by layer",
        lead=f"How close are the words that lenses read in {page.model_name(results)} to the words "
        "of its last layer, at image and question tokens?",
        facts=[
            (f"{len(results['lenses'])}", "lenses"),
            (f"{len(results['layers'])}", "layers"),
            (f"{sum(results['pictures'].values())}", "test pictures"),
        ],
        sections=[*sections, learning.section(folder, losses)],
        data=page.RECORDS,
    )
    page.write(folder / "index.html", content)


def _select(rows: Rows, **fields: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def _measure(folder: pathlib.Path, results: Results, measure: str) -> page.Section:
    """Build the section on a measure: all lenses side by side, one panel per kind of token."""
    rows = _select(results["curves"], measure=measure, domain="all")
    panels = {
        f"{kind} tokens": of_kind
        for kind in results["kinds"]
        if (of_kind := _select(rows, kind=kind))
    }
    label = LABELS[measure]
    chart = [
        charts.curves(
            title, charts.curves_of(of_kind, "lens", KEYS), style.palette(results["lenses"]),
            "layer", label,
        )
        for title, of_kind in panels.items()
    ]  # fmt: skip
    drawn = by_layer(panels, "lens", label)
    differences = _select(results["beyond_logit"], measure=measure)
    return page.Section(
        title=TITLES[measure],
        reading=_read(results, measure),
        figures=[parts.write_figure(folder, measure, drawn, f"{label} by layer", chart=chart)],
        table=page.Table(
            ("lens", "kind", "layer", "beyond the logit lens", "interval"),
            [(row["lens"], row["kind"], f"{row['layer']}", page.signed(row["value"]),
              f"[{page.signed(row['low'])}, {page.signed(row['high'])}]") for row in differences],
            sortable=True,
        ),
        note="Means over tokens; bands and intervals: 95 % bootstrap over pictures. At the last "
        "layer every lens is the model's own distribution.",
        data=[(f"{name}.csv", f"tables/{name}.csv") for name in ("curves", "beyond_logit")],
    )  # fmt: skip


def _read(results: Results, measure: str) -> str:
    """Return the sentence on the middle layer at the first kind of token."""
    kind, layer = results["kinds"][0], results["layers"][len(results["layers"]) // 2]
    rows = _select(results["curves"], measure=measure, domain="all", kind=kind, layer=layer)
    values = [f"{row['value']:.2f} by the {row['lens']} lens" for row in rows]
    return f"At layer {layer} and {kind} tokens: {parts.join_words(values)}."


def _domains(folder: pathlib.Path, results: Results) -> page.Section:
    """Build the section on the domains: the KL at the first kind of token, one panel per lens."""
    kind, label = results["kinds"][0], LABELS["kl"]
    rows = _select(results["curves"], measure="kl", kind=kind)
    rows = [row for row in rows if row["domain"] != "all"]
    panels = {f"{name} lens": _select(rows, lens=name) for name in results["lenses"]}
    hue = style.palette(list(results["pictures"]))
    chart = [
        charts.curves(title, charts.curves_of(of_lens, "domain", KEYS), hue, "layer", label)
        for title, of_lens in panels.items()
    ]
    drawn = by_layer(panels, "domain", label)
    return page.Section(
        title="By domain",
        reading=f"The distance from the final words at {kind} tokens, by domain.",
        figures=[parts.write_figure(folder, "domains", drawn, f"{label} by domain", chart=chart)],
        data=[("curves.csv", "tables/curves.csv")],
    )


def _nearest(folder: pathlib.Path, results: Results) -> list[page.Section]:
    """Build the section on the nearest words in texts; empty if there are no texts."""
    rows = results["nearest"]
    if not rows:
        return []
    columns = ("domain", "layer", "value", "low", "high", "chance", "pictures", "cosine",
               "from_layer")  # fmt: skip
    path = folder / "tables/nearest.csv"
    tables.write(path, columns, [[row[column] for column in columns] for row in rows])
    label = "nearest word of the own domain"
    hue = style.palette(list(results["pictures"]))
    chart = [charts.curves("image tokens", charts.curves_of(rows, "domain", KEYS), hue, "layer",
                           label)]  # fmt: skip
    drawn = by_layer({"image tokens": rows}, "domain", label)
    best = max(rows, key=lambda row: row["low"] - row["chance"])
    above = sum(row["low"] > row["chance"] for row in rows)
    section = page.Section(
        title="Nearest words in texts",
        reading=f"In {above} of {len(rows)} cases (domains and layers) an image token is nearest "
        f"to a word of its own domain more often than chance, most clearly in {best['domain']} at "
        f"layer {best['layer']}: {best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}], by "
        f"chance {best['chance']:.2f}.",
        figures=[parts.write_figure(folder, "nearest", drawn, f"{label} by layer", chart=chart)],
        table=page.Table(
            ("domain", "layer", "share", "by chance", "cosine", "mean layer of the words", "words"),
            [(row["domain"], f"{row['layer']}",
              f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", f"{row['chance']:.2f}",
              f"{row['cosine']:.2f}", f"{row['from_layer']:.1f}",
              ", ".join(f"{figures.printable(w)} {s:.2f}" for w, s in row["words"]))
             for row in rows],
        ),
        note=f"LatentLens: the words of {len(results['texts'])} texts, the different answers to "
        "questions about training pictures, at all layers of the study; the nearest by cosine. "
        "Chance is the share of words that are in a domain's texts. Intervals: 95 % bootstrap "
        "over pictures.",
        data=[("nearest.csv", "tables/nearest.csv")],
    )  # fmt: skip
    return [section]


def _words(folder: pathlib.Path, results: Results) -> list[page.Section]:
    """Build the section on words at image tokens; empty if image tokens are not on a grid."""
    shown = [picture for picture in results["words"] if picture["panels"]]
    if not shown:
        return []
    drawn = []
    for number, picture in enumerate(shown):
        panels = picture["panels"]
        with PIL.Image.open(folder / picture["image"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        figure = figures.token_map(
            pixels, [panel["words"] for panel in panels],
            np.array([panel["entropy"] for panel in panels]), [panel["title"] for panel in panels],
        )  # fmt: skip
        alt = f"Most probable word of each lens at the image tokens of {picture['id']}"
        caption = f"{picture['domain']}, {picture['id']}: \u201c{picture['question']}\u201d"
        drawn.append(parts.write_figure(folder, f"words-{number}", figure, alt, caption))
    section = page.Section(
        title="Words on the picture",
        reading="The most probable word of each lens at each image token of a test picture.",
        figures=drawn,
        note="The lower the entropy, the deeper the colour. ↵ is a line break, ␣ white space, ▯ a "
        "character that the font lacks; long words are truncated.",
    )
    return [section]
