"""What a notebook shows of batches, edits, captures and receipts, as HTML."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mllm_jax import sites, tokens

ROWS = 4  # of a batch that are shown
SIDE = 168  # pixels of a tile as shown
WORD = "border-radius:3px;padding:1px 3px;margin:1px;white-space:pre;color:#222;background:{}"
COLOURS = {  # of the kinds of tokens: Okabe and Ito's, made light
    "pad": "#eeeeee", "system": "#cfd8dc", "question": "#9fd4f5", "image": "#f7d58b",
    "newline": "#e6b8d3", "answer": "#8fd9bf", "cls": "#e2a27a", "query": "#f3ee9c",
}  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Rows of plain values."""

    def cells(values: Sequence, tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)
        return f"<tr>{inside}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"<table><thead>{cells(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def receipts(of: Iterable[Any]) -> str:
    """What edits did."""
    columns = "edit", "layers", "tokens", "elements changed", "norm"
    return table(columns, [receipt.line() for receipt in of])


def address(of: sites.Address) -> str:
    """An address as it is written: `lm.mlp.act[12, [7, 3]]`."""
    if of.units.form == "pairs" or (of.units.form == "mask" and of.units.value.ndim > 1):
        return f"{of.site}[{_selection(of.units)}]"
    parts = [of.layers, of.units] if of.site.stacked else [of.units]
    while parts and parts[-1].form == "all":
        parts.pop()
    return f"{of.site}[{', '.join(map(_selection, parts))}]" if parts else str(of.site)


def _selection(of: sites.Selection) -> str:
    if of.form == "all":
        return ":"
    value = np.asarray(of.value)
    if of.form == "mask":
        return f"{value.sum():,} of a mask"
    if of.form == "range":
        start, stop, step = value.tolist()
        shown = f"{start or ''}:{'' if stop == sites.END else stop}"
        return shown if step == 1 else f"{shown}:{step}"
    if of.form == "pairs":
        return _few([tuple(pair) for pair in value.tolist()])
    return str(value.item()) if of.form == "one" else _few(value)


def where(of: tokens.Where | None) -> str:
    """A token selector as it is written: `image & ~last`."""
    if of is None:
        return ""
    named = (name for name, known in tokens.NAMED.items() if _same(of, known))
    if name := next(named, None):
        return name
    if of.form in ("or", "and"):
        left, right = map(where, of.parts)
        return f"({left} {'|' if of.form == 'or' else '&'} {right})"
    if of.form == "not":
        return f"~{where(of.parts[0])}"
    if of.form == "mask":
        return f"{np.asarray(of.value).sum():,} of a mask"
    return f"{of.form}({np.asarray(of.value)})"


def _same(a: tokens.Where, b: tokens.Where) -> bool:
    return a.form == b.form and not a.parts and np.array_equal(a.value, b.value)


def value(of: Any) -> str:
    """A number, a few numbers, or the shape of many."""
    array = np.asarray(of)
    if not array.ndim:
        return f"{array.item():.4g}"
    return _few(array) if array.ndim == 1 else f"array {list(array.shape)}"


def _few(array: Sequence, most: int = 6) -> str:
    numbers = np.asarray(array).dtype.kind == "f"
    shown = [f"{entry:.4g}" if numbers else str(entry) for entry in array[:most]]
    more = [f"... {len(array):,} in all"] if len(array) > most else []
    return f"[{', '.join(shown + more)}]"


def edits(of: Iterable[Any]) -> str:
    """The changes of an `Edits`, in order."""
    rows = ((e.kind, address(e.address), where(e.where), _how(e)) for e in of)
    return table(("edit", "site", "where", "how"), rows)


def _how(edit: Any) -> str:
    """What an edit is given beside its place."""
    told = [f"{name} {value(array)}" for name, array in edit.values.items()]
    if edit.fn is not None:
        told.insert(0, getattr(edit.fn, "__name__", type(edit.fn).__name__))
    if edit.route is not None:
        source, into = map(value, edit.route)
        told.append(f"rows {source} into {into}")
    if edit.on is not None:
        told.append(f"on {where(edit.on)}")
    if edit.strengths is not None:
        told.append(f"by step {value(edit.strengths)}")
    return ", ".join(told)


def capture(of: Any) -> str:
    """What a capture brings back."""
    told = [f"by {', '.join(of.by)}"] if of.by else []
    told += [f"{of.k} words"] if of.form == "lens" else []
    told += [f"on {where(of.on)}"] if of.on is not None else []
    line = of.form, address(of.address), where(of.where), ", ".join(told)
    return table(("capture", "site", "where", "how"), [line])


def batch(of: Any) -> str:
    """The first rows of a batch: its words coloured by kind, and what is seen of its pictures.

    What no token reads of a picture is dark. A batch that no processor made has no words and no
    pictures: its token numbers are shown.
    """
    of = jax.tree.map(np.asarray, of)
    kinds = of.tokens.kind
    present = [name for code, name in enumerate(tokens.KINDS) if (kinds == code).any()]
    counts = (f"{name} x {(kinds == tokens.CODE[name]).sum():,}" for name in present)
    key = "".join(_span(text, name) for text, name in zip(counts, present, strict=True))
    shown = "".join(
        f"<div style='margin:8px 0;line-height:1.7'><b>{row}</b> {_words(of, row)}"
        f"<div>{''.join(_tiles(of, row))}</div></div>"
        for row in range(min(ROWS, len(kinds)))
    )
    more = f"<p>and {len(kinds) - ROWS} more rows</p>" if len(kinds) > ROWS else ""
    B, T = kinds.shape
    return f"<div><p>{B} rows of {T} tokens: {key}</p>{shown}{more}</div>"


def _span(text: str, kind: str) -> str:
    return f"<span style='{WORD.format(COLOURS[kind])}'>{html.escape(text)}</span>"


def _words(of: Any, row: int) -> str:
    """The tokens of a row; what is not a word is counted."""
    kinds, tiles = of.tokens.kind[row], of.tokens.tile[row]
    found = []
    runs = itertools.groupby(range(len(kinds)), key=lambda at: (kinds[at], tiles[at]))
    for (code, tile), places in runs:
        name, places = tokens.KINDS[code], list(places)
        if name in tokens.TEXT:
            found += [_span(_word(of, row, at), name) for at in places]
        else:
            found.append(_span(f"{name}{f' {tile}' if tile >= 0 else ''} x {len(places)}", name))
    return " ".join(found)


def _word(of: Any, row: int, at: int) -> str:
    token = int(of.ids[row, at])
    word = str(token) if of.processor is None else of.processor.word(token)
    return word.replace("\n", "↵")


def _tiles(of: Any, row: int) -> Iterator[str]:
    """The tiles that a row reads, with a cell for each of their tokens."""
    if of.processor is None or of.features is not None or not of.pixels.size:
        return
    config, map_ = of.processor.config, of.tokens
    at, tile, down, across = (
        array[row] for array in (of.image_token_index, map_.tile, map_.row, map_.column)
    )
    for number in np.unique(tile[(at >= 0) & (tile >= 0)]):
        own = (at >= 0) & (tile == number)
        cells = np.zeros((config.token_grid,) * 2, bool)
        grid = own & (down >= 0)
        cells[down[grid], across[grid]] = True
        picture = _picture(of, int(at[own][0]) // config.image_tokens, cells)
        title = f"tile {number}: tokens {np.flatnonzero(own)[0]} to {np.flatnonzero(own)[-1]}"
        yield f"<img style='margin:4px 6px 0 0' title='{title}' alt='{title}' src='{picture}'>"


def _picture(of: Any, tile: int, cells: np.ndarray) -> str:
    """A tile as PNG in a data address, what no token reads dark, a line between tokens."""
    import PIL.Image

    prepared = of.processor.image_processor
    mean, spread = (getattr(prepared, f"image_{name}", n) for name, n in (("mean", 0), ("std", 1)))
    pixels = of.pixels[tile] * np.asarray(spread) + np.asarray(mean)
    picture = PIL.Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    shown = np.array(picture.resize((SIDE, SIDE)), np.float32)
    if len(cells):
        step = np.arange(SIDE) * len(cells) // SIDE
        read = cells[np.ix_(step, step)]
        edge = np.diff(step, prepend=0) > 0
        shown[~read] *= 0.25
        shown[(edge[:, None] | edge[None, :]) & read] *= 0.75
    png = io.BytesIO()
    PIL.Image.fromarray(shown.astype(np.uint8)).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
