"""Captures: what to bring back from a forward pass, reduced where it is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, rows, sites, tokens
from mllm_jax.interventions import edits
from mllm_jax.precision import at_least_float32
from mllm_jax.sharding import mesh, split
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
LENS_CHUNK = 128  # tokens whose logits exist at one time
TOP_BLOCK = 128  # values that are looked at together for the highest

# Statistics are of float32, whatever a chip makes of other products.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """What to read at a site. Made by `keep`, `mean`, `stats` and `lens`.

    Attributes:
      form: how it is reduced. Static.
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

    One layer is carried through the scan, not stacked.
    """
    return _capture("keep", target, where)


def mean(target, *, where=None) -> Capture:
    """The mean over the selected tokens of each row: float32[L, B, F]."""
    return _capture("mean", target, where)


def mass(target, *, on, where=None) -> Capture:
    """Attention mass: float32[L, B, N], what the selected queries put on some keys, on average.

    Args:
      target: `sites.lm.attn.pattern`, or layers and heads of it.
      on: the tokens looked at. where: the tokens that look.
    """
    return dataclasses.replace(_capture("mass", target, where), on=tokens.of(on))


def stats(target, *, by=None, where=None) -> Capture:
    """Statistics over rows and tokens, see `Stats`.

    Args:
      by: `tokens.kind` to split them by kind of token, or some names of it.
    """
    return _capture("stats", target, where, _split(target, by))


def lens(target, *, k: int = 10, by=None, where=None) -> Capture:
    """The logit lens, see `Lens`; with `by`, its entropy summed by row and kind, see `Entropy`.

    Args:
      k: how many most probable words.
      by: `tokens.kind`, or some names of it.
    """
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
class Stats:
    """Statistics of every unit. With `by`, a last axis of kinds; the layer axis leads.

    Attributes:
      positive: int32[L, F, kinds], how often the value was above zero.
      sum, squares: float32[L, F, kinds], of the value and of its square.
      max: float32[L, F, kinds], -inf where there was no token.
      tokens: int32[L, kinds], how many there were.
      kinds: what the last axis means; empty without `by`. Static.
    """

    positive: Any
    sum: Any
    squares: Any
    max: Any
    tokens: Any
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def merge(self, other: Stats) -> Stats:
        """Of both sets of tokens. Integers are exact, in any order."""
        return Stats(
            positive=self.positive + other.positive,
            sum=self.sum + other.sum,
            squares=self.squares + other.squares,
            max=np.maximum(self.max, other.max),
            tokens=self.tokens + other.tokens,
            kinds=self.kinds,
        )

    def wide(self) -> Stats:
        """The same in int64 and float64 on the host, to be added up over a data set."""
        return Stats(
            positive=np.asarray(self.positive, np.int64),
            sum=np.asarray(self.sum, np.float64),
            squares=np.asarray(self.squares, np.float64),
            max=np.asarray(self.max, np.float32),
            tokens=np.asarray(self.tokens, np.int64),
            kinds=self.kinds,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lens:
    """What each token's residual says through the head.

    Attributes:
      ids: int32[L, B, T, k], most probable words, best first; -1 where not selected.
      log_probs: float32[L, B, T, k], natural logarithm; 0 where not selected.
      entropy: float32[L, B, T], nats; 0 where not selected.
    """

    ids: Any
    log_probs: Any
    entropy: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entropy:
    """Entropy of the lens, summed over the tokens of each row by kind.

    Attributes:
      sum: float32[L, B, kinds], nats.
      top: float32[L, B, kinds], probability of the most probable word, summed.
      tokens: int32[L, B, kinds].
      kinds: what the last axis means. Static.
    """

    sum: Any
    top: Any
    tokens: Any
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def merge(self, other: Entropy) -> Entropy:
        """Of the rows of both; see `wide`."""
        pairs = zip(self._arrays(), other._arrays(), strict=True)
        return Entropy(*(a + b for a, b in pairs), self.kinds)

    def wide(self) -> Entropy:
        """All rows together, without their axis, in float64 and int64: for any number of rows."""
        return Entropy(
            sum=np.asarray(self.sum, np.float64).sum(-2),
            top=np.asarray(self.top, np.float64).sum(-2),
            tokens=np.asarray(self.tokens, np.int64).sum(-2),
            kinds=self.kinds,
        )

    def _arrays(self):
        return self.sum, self.top, self.tokens


def join(
    captures: dict[str, Capture], parts: Sequence[dict[str, Any]], rows: Sequence[int], size: int
) -> dict[str, Any]:
    """Captures of several batches of one shape as one, on the host.

    Statistics are added up, all else is put row after row (picture after picture on the vision
    side).

    Args:
      parts: by name, of each batch.
      rows: of each batch, how many are real; those after them only fill it up.
      size: rows of a batch.
    """
    share = [n / size for n in rows]

    def one(name: str, capture: Capture):
        found = [part[name] for part in parts]
        if capture.form == "stats":
            return functools.reduce(Stats.merge, (stats.wide() for stats in found))
        axis = int(capture.address.site.stacked and capture.address.layers.form != "one")
        return jax.tree.map(lambda *arrays: _first(arrays, share, axis), *found)

    return {name: one(name, capture) for name, capture in captures.items()}


def _first(arrays, share: Sequence[float], axis: int) -> np.ndarray:
    """Of each array the first entries of an axis, one after the other."""
    counts = [round(part * array.shape[axis]) for array, part in zip(arrays, share, strict=True)]
    some = [np.take(a, range(n), axis) for a, n in zip(arrays, counts, strict=True)]
    return np.concatenate(some, axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundCapture:
    """A capture in the shapes of a model and a batch.

    Attributes:
      slots: int32[L], where a layer's result is carried, `count` for nowhere; None stacks all.
      order: int32[count], the slots of the layers asked; a layer asked twice has one slot.
      count: how many layers are asked. Static.
      single: whether the layer axis is dropped at the end. Static.
      units: int32[n] of the units brought back, or None for all.
      tokens: bool[B, T]. kind: int8[B, T]. on: bool[B, S] or None.
    """

    form: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    by: tuple[str, ...] | None = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    single: bool = dataclasses.field(metadata={"static": True})
    slots: Any
    order: Any
    units: Any
    tokens: Any
    kind: Any
    on: Any

    def read(self, x: jax.Array, lens: Callable | None) -> Any:
        """The result of one layer."""
        if self.units is not None:
            x = jnp.take(x, self.units, axis=edits.unit_axis(self.site))
        return READ[self.form](self, x, lens)


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
    if (capture.form == "mass") != (site == sites.lm.attn.pattern) and capture.form != "keep":
        raise ValueError(f"{capture.form} does not read {site.name}; mass reads lm.attn.pattern")
    if capture.form in ("lens", "entropy") and site.axes[-1] != "D":
        raise ValueError(f"a lens reads tensors of the LM's width D; {site.name} is [{site.shape}]")
    if capture.form in ("lens", "entropy") and address.units.form != "all":
        raise ValueError(f"a lens reads all units of {site.name}: its address is [layers]")
    if capture.form in ("lens", "entropy") and site == sites.lm.norm:
        raise ValueError("a lens norms what it reads, and lm.norm is normed already: read logits")
    slots, order, count, single = None, None, spec.layers, not site.stacked
    if site.stacked and address.layers.form != "all":
        chosen = address.layers.indices(spec.layers, f"{site.name}: layer")
        count, single = len(chosen), address.layers.form == "one"
        if not count:
            raise ValueError(f"the capture of {site.name} selects no layer")
        slots = _slots(chosen, spec.layers)
        order = slots[chosen]
    units = None
    if address.units.form != "all":
        units = address.units.indices(spec.shape[edits.unit_axis(site)], f"{site.name}: unit")
    map_ = site.entry(maps)
    return BoundCapture(
        capture.form, site, capture.by, capture.k, count, single,
        slots, order, units, capture.where.mask(map_), map_.kind,
        None if capture.on is None else capture.on.mask(map_),
    )  # fmt: skip


def _slots(chosen, layers: int):
    if isinstance(chosen, np.ndarray):
        slots = np.full((layers,), len(chosen), np.int32)
        slots[chosen] = np.arange(len(chosen))
        return slots
    return jnp.full((layers,), len(chosen), jnp.int32).at[chosen].set(jnp.arange(len(chosen)))


def _read_keep(capture: BoundCapture, x, lens):
    mask = along_tokens(capture.tokens, edits.token_axis(capture.site), x.ndim)
    return jnp.where(mask, x, 0)


def along_tokens(array, axis: int, rank: int):
    """An array [B, T] with ones for the other axes of a site whose tokens are on `axis`."""
    B, T = array.shape
    return array.reshape(B, *(1,) * (axis - 1), T, *(1,) * (rank - axis - 1))


def _read_mean(capture: BoundCapture, x, lens):
    weight = capture.tokens.astype(jnp.float32)
    total = _product("BT...,BT->B...", at_least_float32(x), weight)
    count = jnp.maximum(weight.sum(-1), 1)
    return total / count.reshape(-1, *(1,) * (total.ndim - 1))


def _read_mass(capture: BoundCapture, x, lens):
    on = _product("BNTS,BS->BNT", x, capture.on.astype(x.dtype))
    weight = capture.tokens.astype(x.dtype)
    return _product("BNT,BT->BN", on, weight) / jnp.maximum(weight.sum(-1), 1)[:, None]


def _one_hot(capture: BoundCapture):
    """float32[B, T, kinds]: the selected tokens by kind; one kind without `by`."""
    selected = capture.tokens[..., None]
    if capture.by is not None:
        codes = np.array([tokens.CODE[kind] for kind in capture.by], np.int8)
        selected = selected & (capture.kind[..., None] == codes)
    return selected.astype(jnp.float32)


def _read_stats(capture: BoundCapture, x, lens):
    hot = _one_hot(capture)
    parts = rows.by_row(_row_stats, at_least_float32(x), hot, numbers=x.size)
    *sums, highest = (jnp.moveaxis(part, 1, -1) for part in parts)
    positive, total, squares = (part.sum(0) for part in sums)
    result = Stats(
        positive=positive.astype(jnp.int32),
        sum=total,
        squares=squares,
        max=highest.max(0),
        tokens=hot.sum((0, 1)).astype(jnp.int32),
        kinds=capture.by or (),
    )
    return result if capture.by is not None else jax.tree.map(lambda a: a[..., 0], result)


def _row_stats(x, hot):
    """Each [B, kinds, ...]: how many are positive, the sum, the sum of squares, the highest."""

    def total(of):  # counts stay exact in float32: far fewer than 2^24 tokens in one row
        return _product("BTk,BT...->Bk...", hot, of)

    def highest(column):
        seen = column.reshape(*column.shape, *(1,) * (x.ndim - 2)) > 0
        return jnp.where(seen, x, -jnp.inf).max(1)

    kinds = [highest(hot[..., i]) for i in range(hot.shape[-1])]
    return total((x > 0).astype(x.dtype)), total(x), total(x * x), jnp.stack(kinds, 1)


def _read_lens(capture: BoundCapture, x, lens):
    return _lens_by_chunks(capture, x, lens, max(capture.k, 1))


def _lens_by_chunks(capture: BoundCapture, x, lens, k: int) -> Lens:
    """The selected tokens first, in chunks; chunks without a selected token are not computed.

    On a mesh each data shard orders its own tokens, so that none moves.
    """
    B, T, D = x.shape
    shards = mesh.parts("B", B)
    n = B * T // shards
    mask = jnp.asarray(capture.tokens).reshape(shards, n)
    chunk = min(LENS_CHUNK, n)
    fill = -n % chunk
    order = jnp.argsort(~mask, axis=1, stable=True)

    def chunks(array):  # [shards, n, ...] -> [chunks, shards, chunk, ...]
        tail = array.shape[2:]
        at = order.reshape(shards, n, *(1,) * len(tail))
        array = jnp.take_along_axis(array, at, 1)
        array = jnp.pad(array, ((0, 0), (0, fill), *((0, 0),) * len(tail)))
        array = array.reshape(shards, -1, chunk, *tail).swapaxes(0, 1)
        return mesh.constrain(array, (None, "B", *(None,) * (array.ndim - 2)))

    states, chosen = chunks(x.reshape(shards, n, D)), chunks(mask)
    shape = jax.eval_shape(lens, states[0])

    def one(args):
        states, chosen = args
        skipped = Lens(
            jnp.full((shards, chunk, k), -1, jnp.int32),
            jnp.zeros((shards, chunk, k), shape.dtype),
            jnp.zeros((shards, chunk), shape.dtype),
        )
        return jax.lax.cond(chosen.any(), lambda: _lens(lens(states), chosen, k), lambda: skipped)

    parts = jax.lax.map(one, (states, chosen))
    inverse = jnp.argsort(order, axis=1)

    def unsort(part):
        tail = part.shape[3:]
        flat = part.swapaxes(0, 1).reshape(shards, -1, *tail)[:, :n]
        flat = jnp.take_along_axis(flat, inverse.reshape(shards, n, *(1,) * len(tail)), 1)
        return mesh.constrain(flat.reshape(B, T, *tail), ("B", *(None,) * (1 + len(tail))))

    return jax.tree.map(unsort, parts)


def _lens(logits, chosen, k: int) -> Lens:
    logits = mesh.constrain(logits, ("B", None, "V"))
    best, ids = split.top_k(logits, k, top_k)
    highest = logits.max(-1)
    below = logits - highest[..., None]
    odds = jnp.exp(below)
    total = _over_words(odds)
    entropy = jnp.log(total) - _over_words(odds * below) / total
    log_probs = best - (highest + jnp.log(total))[..., None]
    return Lens(
        ids=jnp.where(chosen[..., None], ids.astype(jnp.int32), -1),
        log_probs=jnp.where(chosen[..., None], log_probs, 0),
        entropy=jnp.where(chosen, entropy, 0),
    )


def _over_words(x):
    """x.sum(-1), as a product with ones: a CPU adds up in it eight numbers at a time."""
    return jnp.matmul(x, jnp.ones(x.shape[-1:], x.dtype), precision=jax.lax.Precision.HIGHEST)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`, by way of the k blocks with the highest maxima: they hold all the best.

    Of equal values the first is taken, as there.
    """
    blocks = -(-x.shape[-1] // TOP_BLOCK)
    if blocks <= 2 * k:
        return jax.lax.top_k(x, k)
    fill = [(0, 0)] * (x.ndim - 1) + [(0, blocks * TOP_BLOCK - x.shape[-1])]
    x = jnp.pad(x, fill, constant_values=-jnp.inf).reshape(*x.shape[:-1], blocks, TOP_BLOCK)
    block = jnp.sort(jax.lax.top_k(x.max(-1), k)[1])
    candidates = jnp.take_along_axis(x, block[..., None], -2)
    best, at = jax.lax.top_k(candidates.reshape(*block.shape[:-1], -1), k)
    return best, jnp.take_along_axis(block, at // TOP_BLOCK, -1) * TOP_BLOCK + at % TOP_BLOCK


def _read_entropy(capture: BoundCapture, x, lens):
    result = _lens_by_chunks(capture, x, lens, 1)
    hot = _one_hot(capture)
    return Entropy(
        sum=_product("BT,BTk->Bk", result.entropy, hot),
        top=_product("BT,BTk->Bk", jnp.exp(result.log_probs[..., 0]), hot),
        tokens=hot.sum(1).astype(jnp.int32),
        kinds=capture.by or (),
    )


READ: dict[str, Callable] = {
    "keep": _read_keep,
    "mean": _read_mean,
    "mass": _read_mass,
    "stats": _read_stats,
    "lens": _read_lens,
    "entropy": _read_entropy,
}
