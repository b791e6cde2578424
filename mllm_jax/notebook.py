"""Batches, edits, captures and receipts as HTML, for notebooks."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mllm_jax import selections, sites, tokens
from mllm_jax.typing import ArrayLike

ROWS = 4  # rows of a batch that are shown
SIDE = 168  # pixels of the side of a tile as shown
WORD = "border-radius:3px;padding:1px 3px;margin:1px;white-space:pre;color:#222;background:{}"
COLOURS = {  # by kind of token: the palette of Okabe and Ito, lightened
    "pad": "#eeeeee", "system": "#cfd8dc", "question": "#9fd4f5", "image": "#f7d58b",
    "newline": "#e6b8d3", "answer": "#8fd9bf", "cls": "#e2a27a", "query": "#f3ee9c",
}  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a table of plain values."""

    def cells(values: Sequence, tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)
        return f"<tr>{inside}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"<table><thead>{cells(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def receipts(items: Iterable[Any]) -> str:
    """Return a table of receipts."""
    columns = "edit", "layers", "tokens", "elements changed", "norm"
    return table(columns, [receipt.line() for receipt in items])


def address(address: sites.Address) -> str:
    """Return an address in its syntax: `lm.mlp.act[12, [7, 3]]`."""
    layers, units, site = address.layers, address.units, address.site
    if units.form == "pairs" or (units.form == "mask" and units.value.ndim > 1):
        return f"{site}[{_selection(units)}]"
    parts = [layers, units] if site.stacked else [units]
    while parts and parts[-1].form == "all":
        parts.pop()
    return f"{site}[{', '.join(map(_selection, parts))}]" if parts else str(site)


def _selection(selection: selections.Selection) -> str:
    if selection.form == "all":
        return ":"
    value = np.asarray(selection.value)
    if selection.form == "mask":
        return f"{value.sum():,} of a mask"
    if selection.form == "range":
        start, stop, step = value.tolist()
        shown = f"{start or ''}:{'' if stop == selections.END else stop}"
        return shown if step == 1 else f"{shown}:{step}"
    if selection.form == "pairs":
        return _few([tuple(pair) for pair in value.tolist()])
    return str(value.item()) if selection.form == "one" else _few(value)


def where(selector: tokens.Where | None) -> str:
    """Return a token selector in its syntax: `image & ~last`."""
    if selector is None:
        return ""
    form, parts, value = selector.form, selector.parts, selector.value
    named = (name for name, known in tokens.NAMED.items() if _same(selector, known))
    if name := next(named, None):
        return name
    if form in ("or", "and"):
        left, right = map(where, parts)
        return f"({left} {'|' if form == 'or' else '&'} {right})"
    if form == "not":
        return f"~{where(parts[0])}"
    if form == "mask":
        return f"{np.asarray(value).sum():,} of a mask"
    return f"{form}({np.asarray(value)})"


def _same(a: tokens.Where, b: tokens.Where) -> bool:
    if a.form != b.form or a.parts:
        return False
    return np.array_equal(np.asarray(a.value), np.asarray(b.value))


def value(value: ArrayLike) -> str:
    """Return a number, a few numbers, or the shape of an array."""
    array = np.asarray(value)
    if not array.ndim:
        return f"{array.item():.4g}"
    return _few(array) if array.ndim == 1 else f"array {list(array.shape)}"


def _few(array: Sequence | np.ndarray, most: int = 6) -> str:
    numbers = np.asarray(array).dtype.kind == "f"
    shown = [f"{entry:.4g}" if numbers else str(entry) for entry in array[:most]]
    more = [f"... {len(array):,} in all"] if len(array) > most else []
    return f"[{', '.join(shown + more)}]"


def edits(items: Iterable[Any]) -> str:
    """Return a table of edits, in order."""
    rows = ((e.kind, address(e.address), where(e.where), _arguments(e)) for e in items)
    return table(("edit", "site", "where", "how"), rows)


def _arguments(edit: Any) -> str:
    """Return the arguments of an edit other than its target and tokens."""
    arguments = [f"{name} {value(array)}" for name, array in edit.values.items()]
    if edit.fn is not None:
        arguments.insert(0, getattr(edit.fn, "__name__", type(edit.fn).__name__))
    if edit.route is not None:
        source, into = map(value, edit.route)
        arguments.append(f"rows {source} into {into}")
    if edit.on is not None:
        arguments.append(f"on {where(edit.on)}")
    if edit.splice is not None:
        arguments.append(f"dictionary of {edit.splice.dictionary.widths[1]} latents")
    if edit.strengths is not None:
        arguments.append(f"by step {value(edit.strengths)}")
    return ", ".join(arguments)


def capture(capture: Any) -> str:
    """Return a table of a capture and its arguments."""
    arguments = [f"by {', '.join(capture.by)}"] if capture.by else []
    arguments += [f"{capture.k} words"] if capture.form == "lens" else []
    arguments += [f"on {where(capture.on)}"] if capture.on is not None else []
    line = capture.form, address(capture.address), where(capture.where), ", ".join(arguments)
    return table(("capture", "site", "where", "how"), [line])


def batch(batch: Any) -> str:
    """Return the first rows of a batch: words coloured by kind, and the tiles of its pictures.

    Parts of a picture that no token reads are dark. For a batch that was not made by a processor,
    token ids are shown instead of words and pictures.
    """
    batch = jax.tree.map(np.asarray, batch)
    kinds = batch.tokens.kind
    present = [name for code, name in enumerate(tokens.KINDS) if (kinds == code).any()]
    counts = (f"{name} x {(kinds == tokens.CODE[name]).sum():,}" for name in present)
    key = "".join(_span(text, name) for text, name in zip(counts, present, strict=True))
    shown = "".join(
        f"<div style='margin:8px 0;line-height:1.7'><b>{row}</b> {_words(batch, row)}"
        f"<div>{''.join(_tiles(batch, row))}</div></div>"
        for row in range(min(ROWS, len(kinds)))
    )
    more = f"<p>and {len(kinds) - ROWS} more rows</p>" if len(kinds) > ROWS else ""
    B, T = kinds.shape
    return f"<div><p>{B} rows of {T} tokens: {key}</p>{shown}{more}</div>"


def _span(text: str, kind: str) -> str:
    return f"<span style='{WORD.format(COLOURS[kind])}'>{html.escape(text)}</span>"


def _words(batch: Any, row: int) -> str:
    """Return the words of a row, and the number of tokens of each other kind between them."""
    kinds, tiles = batch.tokens.kind[row], batch.tokens.tile[row]
    spans = []
    runs = itertools.groupby(range(len(kinds)), key=lambda at: (kinds[at], tiles[at]))
    for (code, tile), run in runs:
        name, places = tokens.KINDS[code], list(run)
        if name in tokens.TEXT:
            spans += [_span(_word(batch, row, at), name) for at in places]
        else:
            spans.append(_span(f"{name}{f' {tile}' if tile >= 0 else ''} x {len(places)}", name))
    return " ".join(spans)


def _word(batch: Any, row: int, at: int) -> str:
    token = int(batch.ids[row, at])
    word = str(token) if batch.processor is None else batch.processor.word(token)
    return word.replace("\n", "↵")


def _tiles(batch: Any, row: int) -> Iterator[str]:
    """Yield the tiles that a row reads, with a cell for each of their tokens."""
    if batch.processor is None or batch.features is not None or not batch.pixels.size:
        return
    config, map_ = batch.processor.config, batch.tokens
    at, tile, down, across = (
        array[row] for array in (batch.image_token_index, map_.tile, map_.row, map_.column)
    )
    for number in np.unique(tile[(at >= 0) & (tile >= 0)]):
        own = (at >= 0) & (tile == number)
        grid = own & (down >= 0)
        shape = [config.token_grid] * 2
        if config.tile_side is None:  # each picture has its own grid
            shape = [1 + places[grid].max(initial=-1) for places in (down, across)]
        cells = np.zeros(shape, bool)
        cells[down[grid], across[grid]] = True
        picture = _picture(batch, int(at[own][0]) // config.tile_tokens(batch), cells)
        title = f"tile {number}: tokens {np.flatnonzero(own)[0]} to {np.flatnonzero(own)[-1]}"
        yield f"<img style='margin:4px 6px 0 0' title='{title}' alt='{title}' src='{picture}'>"


def _picture(batch: Any, tile: int, cells: np.ndarray) -> str:
    """Return a tile as the data URL of a PNG with a line between tokens; unread parts are dark."""
    import PIL.Image

    picture = batch.processor.tile_picture(batch, tile)
    shown = np.array(picture.resize((SIDE, SIDE)), np.float32)
    if cells.size:
        down, across = (np.arange(SIDE) * count // SIDE for count in cells.shape)
        read = cells[np.ix_(down, across)]
        edges = (np.diff(step, prepend=0) > 0 for step in (down, across))
        shown[~read] *= 0.25
        shown[np.logical_or.outer(*edges) & read] *= 0.75
    return png(PIL.Image.fromarray(shown.astype(np.uint8)))


def site(site: sites.Site) -> str:
    """Return the description of a site, and its names in other libraries."""
    about = {
        "site": site.name, "is": site.about, "axes": ("L " if site.stacked else "") + site.shape,
        "TransformerLens": site.transformer_lens_name, "transformers": site.hf,
    }  # fmt: skip
    return table(list(about), [list(about.values())])


def target(target: sites.Address) -> str:
    """Return an address: the site and the layers and units of it."""
    return table(("address", "is"), [(address(target), target.site.about)])


def model(model: Any) -> str:
    """Return the parts of a model with their sizes."""
    parts = {name: getattr(model, name, None) for name in ("vision", "qformer", "projector", "lm")}
    lines = []
    for name, part in parts.items():
        leaves = jax.tree.leaves(part)
        if not leaves:
            continue
        config = getattr(model.config, name)
        fields = ("layers", "width", "heads", "kv_heads", "mlp", "vocab", "in_width", "out_width")
        sizes = (f"{f} {getattr(config, f):,}" for f in fields if getattr(config, f, None))
        types = sorted({str(leaf.dtype) for leaf in leaves})
        count = sum(leaf.size for leaf in leaves)
        lines.append((name, f"{count:,}", ", ".join(types), ", ".join(sizes)))
    head = type(model).__name__, "parameters", "type", "sizes"
    return table(head, lines)


def example(example: Any) -> str:
    """Return a picture with its questions and answers."""
    lines = [
        (q.style, q.prompt, q.answer, ", ".join(map(str, q.options))) for q in example.questions
    ]
    title = html.escape(f"{example.domain}: {example.label} ({example.id})")
    return f"<p>{title}</p><img alt='{title}' src='{png(_small(example.image))}'>" + table(
        ("style", "question", "answer", "options"), lines
    )


def domain(domain: Any) -> str:
    """Return the first pictures of a domain with their labels."""
    count = min(len(domain), ROWS)
    figures = "".join(figure(_small(e.image), e.label) for e in (domain[i] for i in range(count)))
    name = html.escape(f"{domain.name}, {domain.split}: {len(domain):,} pictures")
    return f"<p>{name}</p>{figures}"


def _small(picture: Any) -> Any:
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    return picture


def figure(picture: Any, title: str) -> str:
    """Return a PIL picture above its title, to be shown in a line with others."""
    title = html.escape(title)
    return (
        f"<figure style='display:inline-block;margin:4px'><img alt='{title}' "
        f"src='{png(picture)}'><figcaption>{title}</figcaption></figure>"
    )


def png(picture: Any) -> str:
    """Return a PIL picture as the data URL of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
