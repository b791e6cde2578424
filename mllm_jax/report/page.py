"""One self-contained HTML page: sections of a sentence, figures, a table and links to the numbers.

No script, no external resource, light or dark as the reader's system has it. Figures and CSV files
are linked relative to the page, so that the folder can be moved or served as it is.
"""

from __future__ import annotations

import dataclasses
import html
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax import store

# Files that every study writes, as (name, path).
RECORDS = (("results.json", "results.json"), ("manifest.json", "manifest.json"))
# Control characters that reorder the text around them: embeddings, overrides, isolates.
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
MINUS = "\N{MINUS SIGN}"  # of negative numbers, as wide as a plus sign
DASH = "\N{EN DASH}"  # in place of a number that was not measured


@dataclasses.dataclass(frozen=True)
class Figure:
    """An image file beside the page.

    Attributes:
        path: the path relative to the page.
        alt: the text for readers who cannot see the image.
        caption: the text below the image.
        width: the width on the page in CSS pixels; by default the width of the image.
    """

    path: str
    alt: str
    caption: str = ""
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of formatted cells. Columns of numbers are aligned right.

    Attributes:
        columns: the names of the columns.
        rows: the cells of each row.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """One result of a study.

    Attributes:
        title: a few words.
        reading: one sentence on what the figures show.
        figures: the figures, in order.
        table: the main numbers.
        data: (name, path) of the files with all numbers.
        note: how the numbers were measured.
    """

    title: str
    reading: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    data: Sequence[tuple[str, str]] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """The page of a study.

    Attributes:
        title: the title of the page.
        lead: the question of the study, in a sentence or two.
        facts: (number, label) of the row below the title.
        figure: a summary of the study in one figure.
        sections: the results, in order.
        data: (name, path) of the files of the study.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()
    figure: Figure | None = None
    sections: Sequence[Section] = ()
    data: Sequence[tuple[str, str]] = ()


def model_name(results: Mapping[str, Any]) -> str:
    """Return the name of the model of a study, and the edits of all its passes."""
    edits = results.get("edits")
    return (
        f"{results['model']}, edited by \u201c{edits['text']}\u201d," if edits else results["model"]
    )


def signed(value: float) -> str:
    """Return a number with its sign and two decimals; a dash for NaN, which was not measured."""
    return DASH if math.isnan(value) else f"{value:+.2f}".replace("-", MINUS)


def write(path: str | pathlib.Path, page: Page) -> None:
    """Write a page as one HTML file, atomically."""
    store.write(path, render(page))


def render(page: Page) -> str:
    """Return a page as HTML."""
    facts = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(number)}</dd></div>"
        for number, label in page.facts
    )
    links = "".join(
        f'<li><a href="#section-{i}">{_text(section.title)}</a></li>'
        for i, section in enumerate(page.sections, 1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(page.title)}</h1>
<p class="lead">{_text(page.lead)}</p>
{f'<dl class="facts">{facts}</dl>' if facts else ""}
{_figure(page.figure) if page.figure else ""}
{f"<nav><ol>{links}</ol></nav>" if links else ""}
</header>
<main>
{"".join(_section(i, section) for i, section in enumerate(page.sections, 1))}</main>
<footer><p>{_links(page.data)}</p></footer>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    parts = [
        f"<h2>{_text(section.title)}</h2>",
        f'<p class="reading">{_text(section.reading)}</p>',
        *(_figure(figure) for figure in section.figures),
    ]
    if section.table:
        parts.append(_table(section.table))
    if section.note:
        parts.append(f'<p class="note">{_text(section.note)}</p>')
    if section.data:
        parts.append(f'<p class="data">{_links(section.data)}</p>')
    return f'<section id="section-{number}">\n' + "\n".join(parts) + "\n</section>\n"


def _figure(figure: Figure) -> str:
    path = html.escape(figure.path)
    width = f' width="{figure.width}"' if figure.width else ""
    image = f'<img src="{path}"{width} alt="{html.escape(_plain(figure.alt))}">'
    caption = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure><a href="{path}">{image}</a>{caption}</figure>'


def _table(table: Table) -> str:
    numeric = [
        all(_is_number(row[column]) for row in table.rows) for column in range(len(table.columns))
    ]

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{_text(cell)}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )

    rows = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in table.rows)
    absent = any(cell == DASH for row in table.rows for cell in row)
    key = f'<p class="note">{DASH}: not measured, or undecided.</p>' if absent else ""
    return (
        f'<div class="table"><table><thead><tr>{line(table.columns, "th")}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>{key}"
    )


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("+", MINUS, DASH)


def _links(data: Sequence[tuple[str, str]]) -> str:
    return " · ".join(f'<a href="{html.escape(path)}">{_text(name)}</a>' for name, path in data)


def _text(text: str) -> str:
    return html.escape(_plain(text), quote=False)


def _plain(text: str) -> str:
    """Replace the control characters that would reorder the text after them."""
    return BIDI.sub("\N{REPLACEMENT CHARACTER}", text)


STYLE = """
:root { --paper: #ffffff; --ink: #1d2126; --soft: #5d6670; --line: #e3e6ea; --tint: #f5f7f9;
  --link: #0060a0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e6e9ec; --soft: #9aa4ae; --line: #2c333a; --tint: #1c2126;
    --link: #6cb6f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3.5rem 1.5rem 2rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; }
h1 { font-size: 2.3rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 0.8rem; }
h2 { font-size: 1.4rem; letter-spacing: -0.01em; margin: 0 0 0.4rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.lead { font-size: 1.15rem; color: var(--soft); max-width: 48rem; margin: 0 0 1.8rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: 0.5rem 2rem; margin: 0 0 2rem; padding: 1.1rem 0; border: solid var(--line);
  border-width: 1px 0; }
.facts div { display: flex; flex-direction: column; }
.facts dd { margin: 0; font-size: 1.7rem; font-weight: 600; letter-spacing: -0.02em; }
.facts dt { order: 1; color: var(--soft); font-size: 0.85rem; }
nav ol { display: flex; flex-wrap: wrap; gap: 0.3rem 1.6rem; padding: 0; margin: 1.6rem 0 0;
  list-style: none; font-size: 0.92rem; counter-reset: part; }
nav li { counter-increment: part; }
nav li::before { content: counter(part) "  "; color: var(--soft); }
main { counter-reset: section; }
section { padding: 3rem 0 0; margin: 3rem 0 0; border-top: 1px solid var(--line); }
section h2 { counter-increment: section; }
section h2::before { content: counter(section) "  "; color: var(--soft); font-weight: 400; }
.reading { font-size: 1.08rem; max-width: 52rem; margin: 0 0 1.4rem; }
.note, .data, figcaption, footer { color: var(--soft); font-size: 0.88rem; }
.note { max-width: 52rem; }
figure { margin: 0 0 1.4rem; }
figure a { display: block; background: #ffffff; border: 1px solid var(--line); border-radius: 10px;
  padding: 0.9rem; text-align: center; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { padding: 0.5rem 0.2rem 0; }
.table { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--ink);
  vertical-align: bottom; line-height: 1.3; }
th, td { padding: 0.35rem 1.8rem 0.35rem 0; }
td { border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
footer { margin: 4rem 0 0; padding: 1rem 0 0; border-top: 1px solid var(--line); }
@media print { section { break-inside: avoid; } body { padding: 0; } }
"""
