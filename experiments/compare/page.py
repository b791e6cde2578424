"""The page and the tables of a comparison."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.report import page, parts

SHOWN = 200  # rows of a table on the page; files have all
LONGEST = 60  # characters of a setting on the page


def write(workdir: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write the tables and index.html.

    Args:
      workdir: The folder of the comparison.
      results: The content of its results.json.
    """
    folder, runs = pathlib.Path(workdir), results["runs"]
    sections = [
        _settings(folder, results), _numbers(folder, results), _overlap(folder, results)
    ]  # fmt: skip
    content = page.Page(
        title=f"Comparison of {len(runs)} runs of {results['of']}",
        lead=f"What differs between {', '.join(runs)}? Differences are from {runs[0]}.",
        facts=[
            (str(len(runs)), "runs"),
            (str(len(results["settings"])), "settings that differ"),
            (str(len(results["numbers"])), "numbers compared"),
            (str(len(_apart(results))), "differences with an interval beyond zero"),
        ],
        sections=[section for section in sections if section],
        data=page.RECORDS,
    )
    page.write(folder / "index.html", content)


def _settings(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section:
    rows = [[row["setting"], *row["values"]] for row in results["settings"]]
    columns = ["setting", *results["runs"]]
    return page.Section(
        title="Settings that differ",
        reading=f"{len(rows)} settings differ."
        if rows
        else "The runs were made with the same settings.",
        table=page.Table(columns, [[_short(cell) for cell in row] for row in rows[:SHOWN]])
        if rows
        else None,
        data=[parts.write_csv(folder, "settings", columns, rows)],
        note="Fields of the config, versions of packages, fingerprints of model, data and code.",
    )


def _numbers(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section:
    runs, rows = results["runs"], results["numbers"]
    ends = ("", " low", " high")
    columns = ["number", *(f"{run}{end}" for run in runs for end in ends)]
    for run in runs[1:]:
        columns += [f"{run} - {runs[0]}{end}" for end in (*ends, " examples")]
    measured = [row for row in rows if any(v and v["low"] is not None for v in row["values"])]
    shown = [
        [
            row["number"],
            *map(_value, row["values"]),
            *(_value(d, signed=True) for d in row["differences"]),
        ]
        for row in measured[:SHOWN]
    ]
    head = ["number", *runs, *(f"{run} - {runs[0]}" for run in runs[1:])]
    pairs = sum(bool(d and d["examples"]) for row in rows for d in row["differences"])
    return page.Section(
        title="Numbers",
        reading=f"{len(measured)} numbers have intervals; {len(_apart(results))} differences have "
        "an interval that excludes zero.",
        table=page.Table(head, shown) if shown else None,
        data=[parts.write_csv(folder, "numbers", columns, map(_cells, rows))],
        note=f"In brackets: 95 % intervals, not corrected for the number of comparisons. {pairs} "
        "intervals of differences are over the same examples of both runs. The others are computed "
        "from the intervals of both runs as if these were independent, which makes them too wide "
        "if the runs read the same pictures.",
    )


def _overlap(folder: pathlib.Path, results: Mapping[str, Any]) -> page.Section | None:
    rows = results["overlap"]
    if not rows:
        return None
    columns = ["run", "run", "neurons of", "selected", "selected", "both", "Jaccard", "by chance"]
    cells = [
        [
            *row["runs"], row["neurons of"], *map(str, row["selected"]), str(row["both"]),
            f"{row['jaccard']:.3f}", f"{row['chance']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    above = sum(row["jaccard"] > row["chance"] for row in rows)
    return page.Section(
        title="Neurons that both runs selected",
        reading=f"{above} of {len(rows)} pairs share more neurons than random sets of their sizes.",
        table=page.Table(columns, cells[:SHOWN]),
        data=[parts.write_csv(folder, "overlap", columns, cells)],
        note="Jaccard index: neurons of both over neurons of either. By chance: that of random "
        "sets of these sizes.",
    )


def _apart(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the differences whose interval excludes zero."""
    return [
        d
        for row in results["numbers"]
        for d in row["differences"]
        if d and d["low"] is not None and (d["low"] > 0 or d["high"] < 0)
    ]


def _cells(row: Mapping[str, Any]) -> list[Any]:
    cells: list[Any] = [row["number"]]
    for value in row["values"]:
        cells += ["", "", ""] if value is None else [value["value"], *_ends(value)]
    for value in row["differences"]:
        cells += [""] * 4 if value is None else [value["value"], *_ends(value), value["examples"]]
    return cells


def _ends(value: Mapping[str, Any]) -> Sequence[Any]:
    return ["" if value[end] is None else value[end] for end in ("low", "high")]


def _value(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if value is None:
        return page.DASH
    form = "{:+.3f}" if signed else "{:.3f}"
    text = form.format(value["value"])
    if value["low"] is not None:
        text += f" [{form.format(value['low'])}, {form.format(value['high'])}]"
    return text.replace("-", page.MINUS)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
