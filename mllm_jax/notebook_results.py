"""Results of passes as HTML, for notebooks: values and words. All text is escaped."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mllm_jax import notebook
from mllm_jax.typing import Float

LAYERS = 12  # shown of a result, evenly spaced
BEST = 6  # units, bins or words that are listed
Word = Callable[[int], str]


def word_of(processor: Any) -> Word:
    """Return the function from a token to its text; without a processor, the number itself."""
    return str if processor is None else processor.word


def out(receipts: Sequence[Any], logits: Any, captures: Mapping[str, Any], processor: Any) -> str:
    """Return the results of a pass: its receipts, its likeliest next words and its captures."""
    word = word_of(processor)
    parts = [notebook.receipts(receipts)] if receipts else []
    if logits is not None:
        parts.append(f"<p><b>logits</b></p>{next_words(logits, word)}")
    return "".join(parts) + named(captures, word)


def named(captures: Mapping[str, Any], word: Word) -> str:
    """Return captures under their names."""
    return "".join(
        f"<p><b>{html.escape(name)}</b></p>{result(value, word)}"
        for name, value in captures.items()
    )


def result(value: Any, word: Word = str) -> str:
    """Return the result of one capture."""
    if hasattr(value, "_html_"):  # it contains words
        return value._html_(word)
    if hasattr(value, "_repr_html_"):
        return value._repr_html_()
    return notebook.table(
        ("array", "shape", "type", "least", "mean", "most", "first values"),
        [_numbers(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(value)],
    )


def next_words(logits: Any, word: Word) -> str:
    """Return the likeliest next words of the first rows, [B, V] or [B, T, V] at the last token."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim == 3:
        return notebook.table(("shape", "type"), [(list(logits.shape), "float32")])
    lines: list[tuple[Any, ...]] = []
    for row, values in enumerate(logits[: notebook.ROWS]):
        odds = np.exp(values - values.max())
        best = np.argsort(-values, kind="stable")[:BEST]
        lines.append((row, _words(best, odds[best] / odds.sum(), word)))
    return notebook.table(("row", "likeliest next words"), lines)


def stats(stats: Any) -> str:
    """Return statistics by kind, and the units that are most often above zero."""
    kinds = stats.kinds or ("all",)
    positive, tokens, sums, most = (
        np.asarray(a) if stats.kinds else np.asarray(a)[..., None]
        for a in (stats.positive, stats.tokens, stats.sum, stats.max)
    )
    layered = tokens.ndim > 1
    units = int(np.prod(positive.shape[layered:-1]))
    read = tokens.max(0) if layered else tokens
    seen = np.maximum(tokens.sum(0) if layered else tokens, 1).astype(np.float64) * units
    axes = tuple(range(positive.ndim - 1))
    values = zip(
        kinds, read, positive.sum(axes) / seen, sums.sum(axes) / seen, most.max(axes), strict=True
    )
    lines = [
        (kind, f"{n:,}", *((f"{p:.1%}", f"{m:.4g}", f"{x:.4g}") if n else ("", "", "")))
        for kind, n, p, m, x in values
    ]
    head = "kind", "tokens", "above zero", "mean", "most"
    rate = positive.sum(-1) / np.maximum(tokens.sum(-1), 1).reshape(
        *tokens.shape[:-1], *(1,) * (positive.ndim - tokens.ndim)
    )
    return notebook.table(head, lines) + _strongest("most often above zero", rate, "{:.1%}")


def lens(lens: Any, word: Word = str) -> str:
    """Return the words of the last selected token of each row by layer, and their entropy."""
    ids, log_probs, entropy = map(np.asarray, (lens.ids, lens.log_probs, lens.entropy))
    if ids.ndim == 3:
        ids, log_probs, entropy = ids[None], log_probs[None], entropy[None]
    parts: list[str] = []
    for row in range(min(ids.shape[1], notebook.ROWS)):
        selected = np.flatnonzero((ids[:, row] >= 0).any((0, 2)))
        if not len(selected):
            continue
        at = selected[-1]
        lines = [
            (
                layer,
                f"{entropy[layer, row, at]:.2f}",
                _words(ids[layer, row, at, :BEST], np.exp(log_probs[layer, row, at, :BEST]), word),
            )
            for layer in _evenly(len(ids))
        ]
        head = f"row {row}, token {at}: layer", "entropy, nats", "words"
        parts.append(notebook.table(head, lines))
    return "".join(parts)


def distribution(distribution: Any, word: Word = str) -> str:
    """Return the most probable words on average, by layer and kind."""
    ids, probabilities = distribution.top(BEST)
    kinds = distribution.kinds or ("",)
    single = ids.ndim == 1 + bool(distribution.kinds)
    ids, probabilities = (a.reshape(-1, len(kinds), a.shape[-1]) for a in (ids, probabilities))
    tokens = np.asarray(distribution.tokens).reshape(-1, len(kinds))

    def best(layer: int, k: int) -> str:
        pairs = zip(ids[layer, k], probabilities[layer, k], strict=True)
        return ", ".join(f"{word(int(i))} {p:.3f}" for i, p in pairs)

    lines = [
        ("" if single else layer, kind, best(layer, k))
        for layer in _evenly(len(ids))
        for k, kind in enumerate(kinds)
        if tokens[layer, k]
    ]  # fmt: skip
    return notebook.table(("layer", "tokens", "words and their mean probability"), lines)


def entropy(entropy: Any) -> str:
    """Return the mean entropy of the lens by layer and kind."""
    tokens, total = np.asarray(entropy.tokens), np.asarray(entropy.sum, np.float64)
    axes = tuple(range(1, total.ndim - 1))
    count = tokens.sum(axes)
    first = _first_axis(total.ndim == 3)
    return _by_layer(f"mean entropy, nats: {first}", total.sum(axes), count, entropy.kinds)


def top(top: Any) -> str:
    """Return the strongest kept values and their positions; for many units, one of each."""
    value = np.asarray(top.value, np.float64)
    ranks = max(1, BEST // max(1, value[..., 0].size))
    kept = value[..., :ranks] if top.order == "largest" else -value[..., :ranks]
    missing = np.asarray(top.example)[..., :ranks] < 0
    rank = np.where(missing, np.inf, np.where(np.isnan(kept), -np.inf, -kept))
    order = np.argsort(rank, axis=None, kind="stable")[:BEST]
    names = "example", "token", "tile", "row", "column"
    lines: list[tuple[Any, ...]] = []
    for flat in order:
        at = np.unravel_index(flat, kept.shape)
        example, token, tile, *cell = (int(np.asarray(getattr(top, name))[at]) for name in names)
        if example >= 0:
            unit, place = list(map(int, at[:-1])), cell if cell[0] >= 0 else ""
            lines.append((unit, f"{value[at]:.4g}", example, token, tile, place))
    return notebook.table(("unit", f"{top.order} value", *names[:3], "row, column"), lines)


def histogram(histogram: Any) -> str:
    """Return how many values of all units are in each bin."""
    counts, edges = np.asarray(histogram.counts, np.int64), np.asarray(histogram.edges)
    axis = counts.ndim - 1 - bool(histogram.kinds)
    counts = counts.sum(tuple(a for a in range(counts.ndim) if a != axis))
    bounds, nan = [-np.inf, *edges.tolist(), np.inf], int(np.sum(histogram.nan, dtype=np.int64))
    total = max(int(counts.sum()) + nan, 1)
    named = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(bounds)]
    found = dict(zip(named, counts.tolist(), strict=True)) | ({"not a number": nan} if nan else {})
    lines = [(name, f"{n:,}", f"{n / total:.1%}") for name, n in found.items()]
    return notebook.table(("values", "count", "share"), lines)


def mass(mass: Any) -> str:
    """Return the mass by layer and kind of key, averaged over heads and rows that have any."""
    values = np.asarray(mass.values, np.float64)
    head = f"mean attention: {_first_axis(values.ndim == 4)}"
    if values.ndim > 2:  # rows that pad a batch are 0
        read = values.any((0, *range(2, values.ndim)))
        values = values[:, read] if read.any() else values
    values = values.reshape(len(values), -1, values.shape[-1])
    return _by_layer(head, np.nansum(values, 1), (~np.isnan(values)).sum(1), mass.kinds)


def attention_map(attention: Any) -> str:
    """Return maps of the first rows as grey cells, averaged over layers and heads."""
    readers = attention.keys.readers
    rows = len(attention.keys.kind if readers is None else readers)
    parts: list[str] = []
    for row in range(min(rows, notebook.ROWS)):
        try:
            maps = attention.maps(row)
        except ValueError as error:
            return f"<p>{html.escape(str(error))}</p>"
        for tile, values in maps.items():
            cells = values.mean(tuple(range(values.ndim - 2)))
            title = f"row {row}, tile {tile}: from 0 to {np.nanmax(cells):.4g}"
            parts.append(notebook.figure(grey_cells(cells), title))
    return "".join(parts)


def grey_cells(cells: Float[np.ndarray, "rows columns"]) -> Any:
    """Return a map as a PIL picture: white is the maximum, black 0, blue for missing values."""
    import PIL.Image

    missing = np.isnan(cells)
    level = np.nan_to_num(cells / max(np.nanmax(cells, initial=0), 1e-30)).clip(0, 1)
    colours = np.repeat((255 * level[..., None]).astype(np.uint8), 3, -1)
    colours[missing] = (40, 60, 110)
    size = max(1, notebook.SIDE // max(cells.shape))
    return PIL.Image.fromarray(colours.repeat(size, 0).repeat(size, 1))


def generation(generation: Any) -> str:
    """Return the generated text, its receipts and its captures."""
    said = generation.text or [list(map(int, row)) for row in np.asarray(generation.tokens)]
    batch = generation.batch
    word = word_of(None if batch is None else batch.processor)
    receipts = notebook.receipts(generation.receipts) if generation.receipts else ""
    lines = enumerate(said)
    return notebook.table(("row", "generated"), lines) + receipts + named(generation.captures, word)


def _by_layer(head: str, total: np.ndarray, count: np.ndarray, kinds: Iterable[str]) -> str:
    kinds = tuple(kinds) or ("all",)
    total, count = (a.reshape(len(a), -1) for a in (total, count))
    lines = [
        (n, *(f"{t / c:.3f}" if c else "" for t, c in zip(total[n], count[n], strict=True)))
        for n in _evenly(len(total))
    ]
    return notebook.table((head, *kinds), lines)


def _first_axis(is_layers: bool) -> str:
    """Return the name of the first axis, which is rows if a result is of one layer."""
    return "layer" if is_layers else "first axis"


def _evenly(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, LAYERS))})


def _strongest(what: str, values: np.ndarray, form: str) -> str:
    order = np.argsort(-values, axis=None, kind="stable")[:BEST]
    units = [np.unravel_index(flat, values.shape) for flat in order]
    lines = [(list(map(int, at)), form.format(values[at])) for at in units]
    return notebook.table(("unit", what), lines)


def _words(ids: Iterable[int], probabilities: Iterable[float], word: Word) -> str:
    pairs = zip(ids, probabilities, strict=True)
    return ", ".join(f"{word(int(token))!r} {p:.2f}" for token, p in pairs if token >= 0)


def _numbers(path: Any, leaf: Any) -> tuple[Any, ...]:
    array = np.asarray(leaf)
    wide = array.astype(np.float64) if array.size else np.zeros(1)
    first = notebook.value(array.reshape(-1)[:7]) if array.size else ""
    summary = (f"{f(wide):.4g}" for f in (np.min, np.mean, np.max))
    name = jax.tree_util.keystr(path) or "values"
    return name, list(array.shape), array.dtype, *summary, first
