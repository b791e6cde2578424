"""One self-contained HTML page: sections of a sentence, figures, a table and links to the numbers.

It needs no network, and is light or dark as the reader's system. Figures, tables and scripts are
linked relative to the page, so that the folder can be moved or served. Without scripts, and in
print, the images replace the charts.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mllm_jax import store
from mllm_jax.report import charts, markup

# Files that every study writes, as (name, path).
RECORDS = (("results.json", "results.json"), ("manifest.json", "manifest.json"))
MINUS = "\N{MINUS SIGN}"  # of negative numbers, as wide as a plus sign
DASH = "\N{EN DASH}"  # in place of a number that was not measured
SCRIPT = "page.js"  # charts, tables to sort, word maps


def _resource(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


STYLE = _resource("page.css")


class Widget(Protocol):
    """A part of a section that renders itself."""

    def html(self) -> str:
        """Return the part as HTML."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """An image file beside the page.

    Attributes:
      path: The path relative to the page.
      alt: The text for readers who cannot see the image.
      caption: The text below the image.
      width: The width on the page in CSS pixels; by default the width of the image.
      chart: The same figure to hover over and to zoom; replaces the image on a screen.
      downloads: (name, path) of the figure in other formats.
    """

    path: str
    alt: str
    caption: str = ""
    width: int | None = None
    chart: charts.Chart | None = None
    downloads: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of formatted cells. Columns of numbers are aligned right.

    Attributes:
      columns: The names of the columns.
      rows: The cells of each row.
      links: The address to which the first cell of each row leads, if any.
      sortable: Whether the reader can sort the rows and filter them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str] = ()
    sortable: bool = False

    def numeric(self) -> list[bool]:
        """Return whether each column holds only numbers."""
        return [all(map(_is_number, cells)) for cells in zip(*self.rows, strict=True)] or [
            False
        ] * len(self.columns)


@dataclasses.dataclass(frozen=True)
class Section:
    """One result of a study.

    Attributes:
      title: A few words.
      reading: One sentence on what the figures show.
      figures: The figures, in order.
      table: The main numbers.
      data: (name, path) of the files with all numbers.
      note: How the numbers were measured.
      widgets: Further parts, below the table.
      name: The id of the section, to which links lead; its number by default.
      alone: Whether a link to the section hides the other sections of this kind.
    """

    title: str
    reading: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    data: Sequence[tuple[str, str]] = ()
    note: str = ""
    widgets: Sequence[Widget] = ()
    name: str = ""
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """The page of a study.

    Attributes:
      title: The title of the page.
      lead: The question of the study, in a sentence or two.
      facts: (number, label) of the row below the title.
      figure: A summary of the study in one figure.
      sections: The results, in order.
      data: (name, path) of the files of the study.
      contents: Whether links to the sections precede them.
      reload: The seconds after which a browser loads the page again; 0 for never.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()
    figure: Figure | None = None
    sections: Sequence[Section] = ()
    data: Sequence[tuple[str, str]] = ()
    contents: bool = True
    reload: int = 0


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
    """Write a page as one HTML file, atomically, and the scripts that it needs beside it."""
    rendered, folder = render(page), pathlib.Path(path).parent
    for script in _scripts(page):
        source = charts.script() if script == charts.SCRIPT else _resource(script).encode()
        store.write(folder / script, source)
    store.write(path, rendered)


def _figures(page: Page) -> list[Figure]:
    overview = [page.figure] if page.figure else []
    return overview + [figure for section in page.sections for figure in section.figures]


def _scripts(page: Page) -> list[str]:
    """Return the scripts of a page; a page of images and plain tables has none."""
    if any(figure.chart for figure in _figures(page)):
        return [charts.SCRIPT, SCRIPT]
    moves = any(
        section.widgets or (section.table and section.table.sortable) for section in page.sections
    )
    return [SCRIPT] if moves else []


def render(page: Page) -> str:
    """Return a page as HTML."""
    facts = "".join(
        f"<div><dt>{markup.text(label)}</dt><dd>{markup.text(number)}</dd></div>"
        for number, label in page.facts
    )
    links = "".join(
        f'<li><a href="#{_id(i, section)}">{markup.text(section.title)}</a></li>'
        for i, section in enumerate(page.sections if page.contents else (), 1)
    )
    scripts = "".join(f'<script src="{name}" defer></script>\n' for name in _scripts(page))
    reload = f'<meta http-equiv="refresh" content="{page.reload}">\n' if page.reload else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{reload}<title>{markup.text(page.title)}</title>
<style>{STYLE}</style>
{scripts}</head>
<body>
<header>
<h1>{markup.text(page.title)}</h1>
<p class="lead">{markup.text(page.lead)}</p>
{f'<dl class="facts">{facts}</dl>' if facts else ""}
{_figure(page.figure) if page.figure else ""}
{f'<nav aria-label="Sections"><ol>{links}</ol></nav>' if links else ""}
</header>
<main>
{"".join(_section(i, section) for i, section in enumerate(page.sections, 1))}</main>
<footer><p>{_links(page.data)}</p></footer>
</body>
</html>
"""


def _id(number: int, section: Section) -> str:
    return markup.attribute(section.name) or f"section-{number}"


def _section(number: int, section: Section) -> str:
    parts = [
        f"<h2>{markup.text(section.title)}</h2>",
        f'<p class="reading">{markup.text(section.reading)}</p>',
        *(_figure(figure) for figure in section.figures),
    ]
    if section.table:
        parts.append(table(section.table, section.title))
    parts += [widget.html() for widget in section.widgets]
    if section.note:
        parts.append(f'<p class="note">{markup.text(section.note)}</p>')
    if section.data:
        parts.append(f'<p class="data">{_links(section.data)}</p>')
    kind = ' class="alone"' if section.alone else ""
    return f'<section id="{_id(number, section)}"{kind}>\n' + "\n".join(parts) + "\n</section>\n"


def _figure(figure: Figure) -> str:
    path, alt = markup.attribute(figure.path), markup.attribute(figure.alt)
    width = f' width="{figure.width}"' if figure.width else ""
    image = f'<a class="image" href="{path}"><img src="{path}"{width} alt="{alt}"></a>'
    chart = ""
    if figure.chart:
        panels = markup.data([panel.json() for panel in figure.chart])
        chart = f'<div class="chart" role="group" aria-label="{alt}">{panels}</div>'
    caption = f"<span>{markup.text(figure.caption)}</span>" if figure.caption else ""
    downloads = [("PNG", figure.path), *figure.downloads] if figure.downloads else []
    links = f'<span class="downloads">{_links(downloads)}</span>' if downloads else ""
    below = f"<figcaption>{caption}{links}</figcaption>" if caption or links else ""
    return f"<figure>{chart}{image}{below}</figure>"


def table(table: Table, name: str) -> str:
    """Return a table as HTML.

    Args:
      table: The table.
      name: Its name for readers who cannot see it.
    """
    numeric = table.numeric()

    def line(cells: Sequence[str], tag: str, link: str = "") -> str:
        shown = [markup.text(cell) for cell in cells]
        if link:
            shown[0] = f'<a href="{markup.attribute(link)}">{shown[0]}</a>'
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{cell}</{tag}>"
            for cell, number in zip(shown, numeric, strict=True)
        )

    links = table.links or [""] * len(table.rows)
    rows = "".join(
        f"<tr>{line(row, 'td', link)}</tr>\n" for row, link in zip(table.rows, links, strict=True)
    )
    absent = any(cell == DASH for row in table.rows for cell in row)
    key = f'<p class="note">{DASH}: not measured, or undecided.</p>' if absent else ""
    sortable = f' class="sortable" data-name="{markup.attribute(name)}"' if table.sortable else ""
    return (
        f'<div class="table"><table{sortable}><thead><tr>{line(table.columns, "th")}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>{key}"
    )


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("+", MINUS, DASH)


def _links(data: Sequence[tuple[str, str]]) -> str:
    return " · ".join(
        f'<a href="{markup.attribute(path)}">{markup.text(name)}</a>' for name, path in data
    )
