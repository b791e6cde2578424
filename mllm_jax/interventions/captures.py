"""Captures: what to bring back from a forward pass, reduced where it is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, sites, tokens
from mllm_jax.interventions import edits, logit_lens
from mllm_jax.interventions.results import Entropy, Stats
from mllm_jax.numerics import rows
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.sites import Address

# The kinds a module's or a site's tokens can have: statistics are split by these.
KINDS_OF = {
    "vision": ("cls", "image"),
    "qformer": ("query", "system", "question"),
    "qformer.mlp.act": ("system", "question"),
    "qformer.query_mlp.act": ("query",),
    "projector": ("cls", "image"),
    "lm": ("system", "question", "image", "newline", "answer"),
    "logits": ("system", "question", "image", "newline", "answer"),
}

# Statistics are of float32, whatever a chip makes of other products.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """What to read at a site. Made by `keep`, `mean`, `stats` and `lens`.

    Attributes:
      form: how it is reduced, a name of FORMS. Static.
      address: the site, its layers and units.
      where: which tokens.
      by: kinds of token that the result is split by, or None. Static.
      k: how many words a lens names. Static.
      on: of an attention mass: the keys.
    """

    form: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    by: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    k: int = dataclasses.field(default=0, metadata={"static": True})
    on: tokens.Where | None = None

    def _repr_html_(self) -> str:
        return notebook.capture(self)


def _capture(form, target, where, by=None, k=0) -> Capture:
    return Capture(form, Address.of(target), tokens.of(where), by, k)


def keep(target, *, where=None) -> Capture:
    """The raw values: [L, B, T, F], or [B, T, F] of one layer; zero where not selected.

    Sites of the vision side are kept as they are computed, tile by tile: [L, I, P, F]. One layer
    is carried through the scan, not stacked.
    """
    return _capture("keep", target, where)


def mean(target, *, where=None) -> Capture:
    """The mean over the selected tokens of each row: float32[L, B, F].

    On the vision side these are the tokens of all pictures that the row reads. A row without a
    selected token has no mean: an error where the batch is known, NaN under `jit`. Rows that only
    fill up the batch are 0.
    """
    return _capture("mean", target, where)


def mass(target, *, on, where=None) -> Capture:
    """Attention mass: float32[L, B, N], what the selected queries put on some keys, on average.

    Args:
      target: `sites.lm.attn.pattern`, or layers and heads of it.
      on: the tokens looked at; in a row that has none of them the mass is 0.
      where: the tokens that look; a row without any is as in `mean`.
    """
    return dataclasses.replace(_capture("mass", target, where), on=tokens.of(on))


def stats(target, *, by=None, where=None) -> Capture:
    """Statistics over rows and tokens, see `Stats`.

    What is counted are the tokens of questions: on the vision side a tile counts once for each row
    that reads it, whether or not rows share it. Under `jit`, a selector that selects nothing gives
    0 tokens.

    Args:
      by: `tokens.kind` to split them by kind of token, or some names of it.
    """
    return _capture("stats", target, where, _split(target, by))


def lens(target, *, k: int = 10, by=None, where=None) -> Capture:
    """The logit lens, see `Lens`; with `by`, its entropy summed by row and kind, see `Entropy`.

    Args:
      k: how many most probable words, at most those of the vocabulary.
      by: `tokens.kind`, or some names of it.
    """
    if k < 1:
        raise ValueError(f"lens k={k}: a lens names one word or more")
    return _capture("lens" if by is None else "entropy", target, where, _split(target, by), k)


def _split(target, by) -> tuple[str, ...] | None:
    if by is None:
        return None
    by = (by,) if isinstance(by, str) else tuple(by)
    site = Address.of(target).site
    kinds = site.entry(KINDS_OF)
    if not set(by) <= set(tokens.kind) or not set(by) & set(kinds):
        raise ValueError(
            f"by={', '.join(by)}: kinds of {site.module} tokens are {', '.join(kinds)}"
        )
    return tuple(kind for kind in kinds if kind in by)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundCapture:
    """A capture in the shapes of a model and a batch.

    Attributes:
      slots: int32[L], where a layer's result is carried, `count` for nowhere; None stacks all.
      order: int32[count], the slots of the layers asked; a layer asked twice has one slot.
      absent: bool[count], the layers asked that the model does not have: traced ones, of which
        nothing is told before.
      count: how many layers are asked. Static.
      single: whether the layer axis is dropped at the end. Static.
      units: int32[n] of the units brought back, or None for all.
      tokens: bool[B, T]. kind: int8[B, T]. on: bool[B, S] or None.
      rows: bool[B], False for rows of the batch that only fill it up.
      readers: bool[B, I], which rows read each tile, where the site has tiles in place of rows.
    """

    form: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    by: tuple[str, ...] | None = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    single: bool = dataclasses.field(metadata={"static": True})
    slots: Any
    order: Any
    absent: Any
    units: Any
    tokens: Any
    kind: Any
    on: Any
    rows: Any
    readers: Any

    def read(self, x: jax.Array, lens: Callable | None) -> Any:
        """The result of one layer."""
        if self.units is not None:
            nothing = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
            axis = edits.unit_axis(self.site)
            x = jnp.take(x, self.units, axis=axis, mode="fill", fill_value=nothing)
        return FORMS[self.form].read(self, x, lens)

    def finish(self, kept: Any) -> Any:
        """What was carried, in the order asked: NaN, or 0, for layers that there are not."""

        def one(array):
            array = array[self.order]
            nothing = jnp.nan if jnp.issubdtype(array.dtype, jnp.inexact) else 0
            absent = self.absent.reshape(-1, *(1,) * (array.ndim - 1))
            array = jnp.where(absent, jnp.asarray(nothing, array.dtype), array)
            return array[0] if self.single else array

        return jax.tree.map(one, kept)


def bind(
    captures: dict[str, Capture] | None,
    shapes: dict[str, edits.SiteShape],
    maps: dict[str, tokens.TokenMap],
) -> dict[str, BoundCapture]:
    """Captures in the shapes of a model and a batch; errors as in `binding.bind`."""
    return {name: _bind(c, shapes, maps) for name, c in (captures or {}).items()}


def _bind(capture: Capture, shapes, maps) -> BoundCapture:
    address, site = capture.address, capture.address.site
    spec = edits.look_up(site, shapes)
    FORMS[capture.form].refuse(capture, shapes)
    slots, order, absent, count = None, None, None, spec.layers
    if site.stacked and address.layers.form != "all":
        chosen, absent = _indices(address.layers, spec.layers, f"{site.name}: layer")
        count = len(absent)
        if not count:
            raise ValueError(f"the capture of {site.name} selects no layer")
        slots = _slots(chosen, spec.layers)
        order = (
            slots[chosen]
            if isinstance(chosen, np.ndarray)
            else slots.at[chosen].get(mode="fill", fill_value=count)
        )
    units = None
    if address.units.form != "all":
        size = spec.shape[edits.unit_axis(site)]
        units, _ = _indices(address.units, size, f"{site.name}: unit")
        if not len(units):
            raise ValueError(f"the capture of {site.name} selects no unit")
    map_ = site.entry(maps)
    rows = (maps["lm"].kind != tokens.CODE["pad"]).any(-1)
    bound = BoundCapture(
        capture.form, site, capture.by, capture.k, count,
        not site.stacked or address.layers.form == "one",
        slots, order, absent, units, capture.where.mask(map_), map_.kind,
        None if capture.on is None else capture.on.mask(map_), rows, map_.readers,
    )  # fmt: skip
    _refuse_nothing(bound)
    return bound


def _refuse_tokens(capture: Capture, shapes) -> None:
    site = capture.address.site
    if edits.token_axis(site) != 1:
        raise ValueError(
            f"{capture.form} does not read {site.name}, which is [{site.shape}]; mass reads "
            "lm.attn.pattern, and keep reads every site"
        )


def _refuse_mass(capture: Capture, shapes) -> None:
    if capture.address.site != sites.lm.attn.pattern:
        raise ValueError(
            f"mass does not read {capture.address.site.name}; mass reads lm.attn.pattern"
        )


def _refuse_lens(capture: Capture, shapes) -> None:
    site, words = capture.address.site, shapes[sites.logits.name].shape[-1]
    if site.axes[-1] != "D":
        raise ValueError(f"a lens reads tensors of the LM's width D; {site.name} is [{site.shape}]")
    if capture.address.units.form != "all":
        raise ValueError(f"a lens reads all units of {site.name}: its address is [layers]")
    if site == sites.lm.norm:
        raise ValueError("a lens norms what it reads, and lm.norm is normed already: read logits")
    if capture.form == "lens" and capture.k > words:
        raise ValueError(f"lens k={capture.k} of {site.name}: the vocabulary has {words} words")


def _refuse_nothing(bound: BoundCapture) -> None:
    """Errors of a capture that selects no token, where the batch is known."""
    read, on = bound.tokens, bound.on
    if not FORMS[bound.form].some:
        return
    if any(isinstance(a, jax.core.Tracer) for a in (read, on, bound.rows, bound.readers)):
        return
    what = f"the {bound.form} of {bound.site.name} selects no"
    count = np.asarray(read).sum(-1)
    if bound.readers is not None:
        count = np.asarray(bound.readers) @ count
    if not count.any():
        raise ValueError(f"{what} token of this batch (see where=)")
    if on is not None and not np.asarray(on).any():
        raise ValueError(f"{what} key of this batch (see on=)")
    without = np.flatnonzero(np.asarray(bound.rows) & (count == 0))
    if FORMS[bound.form].every_row and len(without):
        raise ValueError(
            f"{what} token of row {without[0]}, which has no {bound.form} then: choose others with "
            "where=, or leave such rows out of the batch"
        )


def _indices(selection: sites.Selection, size: int, what: str):
    """Entries of an axis int32[n], `size` for those that there are not, and which these are.

    Traced entries alone can be out of range; known ones are an error then.
    """
    if selection.form in ("one", "index") and isinstance(selection.value, jax.core.Tracer):
        index = jnp.atleast_1d(selection.value)
        absent = (index < -size) | (index >= size)
        return jnp.where(absent, size, index % size), absent
    chosen = selection.indices(size, what)
    return chosen, np.zeros(len(chosen), bool)


def _slots(chosen, layers: int):
    if isinstance(chosen, np.ndarray):
        slots = np.full((layers,), len(chosen), np.int32)
        slots[chosen] = np.arange(len(chosen))
        return slots
    slots = jnp.full((layers,), len(chosen), jnp.int32)
    return slots.at[chosen].set(jnp.arange(len(chosen)), mode="drop")


def _read_keep(capture: BoundCapture, x, lens):
    mask = along_tokens(capture.tokens, edits.token_axis(capture.site), x.ndim)
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def along_tokens(array, axis: int, rank: int):
    """An array [B, T] with ones for the other axes of a site whose tokens are on `axis`."""
    B, T = array.shape
    return array.reshape(B, *(1,) * (axis - 1), T, *(1,) * (rank - axis - 1))


def _read_mean(capture: BoundCapture, x, lens):
    chosen = along_tokens(capture.tokens, 1, x.ndim)
    total = jnp.where(chosen, at_least_float32(x), 0).sum(1)
    return _average(capture, total, capture.tokens.sum(-1))


def _read_mass(capture: BoundCapture, x, lens):
    seen = _product("BNTS,BS->BNT", at_least_float32(x), capture.on.astype(jnp.float32))
    total = jnp.where(capture.tokens[:, None], seen, 0).sum(-1)
    return _average(capture, total, capture.tokens.sum(-1))


def _average(capture: BoundCapture, total, count):
    """Sums and numbers of tokens, of each row or tile, to the mean of each row."""
    total, count = _by_row(capture, total), _by_row(capture, count)
    count, rows = (a.reshape(-1, *(1,) * (total.ndim - 1)) for a in (count, capture.rows))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.where(rows, jnp.nan, 0))


def _by_row(capture: BoundCapture, total):
    """Sums of tiles [I, ...] added up over those that each row reads: [B, ...]."""
    if capture.readers is None:
        return total
    readers = jnp.asarray(capture.readers).astype(total.dtype)
    return _product("BI,I...->B...", readers, total)


def _one_hot(capture: BoundCapture):
    """float32[B, T, kinds]: the selected tokens by kind; one kind without `by`."""
    selected = capture.tokens[..., None]
    if capture.by is not None:
        codes = np.array([tokens.CODE[kind] for kind in capture.by], np.int8)
        selected = selected & (capture.kind[..., None] == codes)
    return selected.astype(jnp.float32)


def _read_stats(capture: BoundCapture, x, lens):
    hot = _one_hot(capture)
    if capture.readers is not None:  # a tile counts for each row that reads it
        hot = hot * capture.readers.sum(0, dtype=jnp.float32)[:, None, None]
    parts = rows.map_rows_on_cpu(_row_stats, at_least_float32(x), hot, num_elements=x.size)
    positive, sums, off, centred, highest = (jnp.moveaxis(part, 1, -1) for part in parts)
    counts = hot.sum(1)
    counts = counts.reshape(len(hot), *(1,) * (sums.ndim - 2), -1)
    count, total = counts.sum(0), sums.sum(0)
    # A row's mean less that of all, and then what each was rounded by: large means lose nothing.
    apart = sums / jnp.maximum(counts, 1) - total / jnp.maximum(count, 1)
    apart = apart + off / jnp.maximum(counts, 1)
    apart = apart - (counts * apart).sum(0) / jnp.maximum(count, 1)
    centred = (centred + counts * apart**2).sum(0)
    result = Stats(
        positive=positive.astype(jnp.int32).sum(0),
        sum=total,
        squares=centred + total**2 / jnp.maximum(count, 1),
        max=highest.max(0),
        tokens=hot.astype(jnp.int32).sum((0, 1)),
        centred=centred,
        kinds=capture.by or (),
    )
    return result if capture.by is not None else jax.tree.map(lambda a: a[..., 0], result)


def _row_stats(x, hot):
    """Each [B, kinds, ...]: how many are positive, the sum, how far that is off by rounding, the
    squared deviations from the mean, the highest.

    Args:
      x: float[B, T, ...]. hot: float[B, T, kinds], how often a token counts, in one kind at most.
    """

    def total(of):  # counts stay exact in float32: far fewer than 2^24 tokens in one row
        return _product("BTk,BT...->Bk...", hot, of)

    def highest(column):
        seen = column.reshape(*column.shape, *(1,) * (x.ndim - 2)) > 0
        return jnp.where(seen, x, -jnp.inf).max(1)

    x = jnp.where(along_tokens(hot.any(-1), 1, x.ndim), x, 0)
    sums, counts = total(x), jnp.maximum(hot.sum(1), 1)
    counts = counts.reshape(*counts.shape, *(1,) * (x.ndim - 2))
    own = _product("BTk,Bk...->BT...", (hot > 0).astype(x.dtype), sums / counts)
    off = total(x - own)  # nothing, but for the rounding of the mean
    centred = jnp.maximum(total((x - own) ** 2) - off**2 / counts, 0)
    kinds = [highest(hot[..., i]) for i in range(hot.shape[-1])]
    return total((x > 0).astype(x.dtype)), sums, off, centred, jnp.stack(kinds, 1)


def _read_lens(capture: BoundCapture, x, lens):
    return logit_lens.read(x, capture.tokens, lens, max(capture.k, 1))


def _read_entropy(capture: BoundCapture, x, lens):
    result = logit_lens.read(x, capture.tokens, lens, 1)
    hot = _one_hot(capture)
    parts = (
        _product("BT,BTk->Bk", result.entropy, hot),
        _product("BT,BTk->Bk", jnp.exp(result.log_probs[..., 0]), hot),
        hot.sum(1).astype(jnp.int32),
    )
    return Entropy(*(_by_row(capture, part) for part in parts), capture.by or ())


def _read_finite(capture: BoundCapture, x, lens):
    """bool[]: whether x is finite at the selected tokens; see `finite`."""
    mask = along_tokens(capture.tokens, edits.token_axis(capture.site), x.ndim)
    return (jnp.isfinite(x) | ~mask).all()


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to reduce the tensor of a site, and all that others must know of it.

    Attributes:
      read: (capture, x, lens) -> the result of one layer, inside the pass.
      refuse: (capture, shapes), which raises where the form does not read the site.
      options: what is written beside the site in text; None where the form has no name there.
      by: what the rows of a result are: "row" of the batch; "token", of which there are as many as
        at the site, on the vision side tile by tile; "batch" has none, and all are added up.
      merges: whether results have `wide` and `merge`, for a data set of any size.
      every_row: whether a row without a selected token has no result.
      some: whether a capture must select a token.
    """

    read: Callable[[BoundCapture, jax.Array, Callable | None], Any]
    refuse: Callable[[Capture, dict[str, edits.SiteShape]], None] = lambda capture, shapes: None
    options: tuple[str, ...] | None = None
    by: str = "row"
    merges: bool = False
    every_row: bool = False
    some: bool = True


FORMS: dict[str, Form] = {
    "finite": Form(_read_finite, by="batch", some=False),
    "keep": Form(_read_keep, options=("where",), by="token"),
    "mean": Form(_read_mean, _refuse_tokens, ("where",), every_row=True),
    "mass": Form(_read_mass, _refuse_mass, ("on", "where"), every_row=True),
    "stats": Form(_read_stats, _refuse_tokens, ("by", "where"), by="batch", merges=True),
    "lens": Form(_read_lens, _refuse_lens, ("k", "by", "where"), by="token"),
    "entropy": Form(_read_entropy, _refuse_lens, merges=True),
}


def join(
    captures: dict[str, Capture], parts: Sequence[dict[str, Any]], batches: Sequence[Any]
) -> dict[str, Any]:
    """Captures of several batches as one, on the host.

    Statistics are added up, all else is put row after row, without the rows that only fill up a
    batch. `keep` and `lens` of the vision side are put tile after tile.

    Args:
      parts: by name, of each batch.
      batches: the batches.
    """

    def one(name: str, capture: Capture):
        found = [part[name] for part in parts]
        form = FORMS[capture.form]
        if form.by == "batch":
            return functools.reduce(lambda a, b: a.merge(b), (part.wide() for part in found))
        site = capture.address.site
        tiled = form.by == "token" and site.module not in ("lm", "logits")
        real = [np.asarray(b.is_real_tile if tiled else b.valid.any(-1)) for b in batches]
        axis = int(site.stacked and capture.address.layers.form != "one")
        return jax.tree.map(lambda *arrays: _real(arrays, real, axis), *found)

    return {name: one(name, capture) for name, capture in captures.items()}


def _real(arrays, real: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Of each array the real entries of an axis, one after the other."""
    some = [np.compress(keep, a, axis) for a, keep in zip(arrays, real, strict=True)]
    return np.concatenate(some, axis)
