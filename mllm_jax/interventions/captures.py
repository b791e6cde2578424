"""Captures: what to bring back from a forward pass, reduced where it is computed.

`FORMS` registers every way to reduce the tensor of a site; `reductions` holds the computations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import notebook, sites, tokens
from mllm_jax.batch import Batch
from mllm_jax.files import shown as short
from mllm_jax.interventions import attention_maps, reductions, site_rules, top_tokens
from mllm_jax.sites import Address, SiteShape, Target
from mllm_jax.tokens import Selector
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int, Shaped

# The kinds that the tokens of a module or a site can have: statistics are kept apart by them.
TOKEN_KINDS = {
    "vision": ("cls", "image"),
    "qformer": ("query", "system", "question"),
    "qformer.mlp.act": ("system", "question"),
    "qformer.query_mlp.act": ("query",),
    "projector": ("cls", "image"),
    "lm": ("system", "question", "image", "newline", "answer"),
    "logits": ("system", "question", "image", "newline", "answer"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """What to read at a site. Made by `keep`, `mean`, `mass`, `stats`, `lens`, `top`, ...

    Attributes:
      form: How it is reduced, a name of `FORMS`. Static.
      address: The site with the layers and units that are read.
      where: The tokens that are read.
      by: The kinds of token that the result is grouped by, or None. Static.
      k: How many words a lens names. Static.
      on: The keys of an attention mass.
      edges: The edges of the bins of a histogram or a sample, float32[bins - 1].
    """

    form: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    by: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    k: int = dataclasses.field(default=0, metadata={"static": True})
    on: tokens.Where | None = None
    edges: Float[AnyArray, " n"] | None = None

    def _repr_html_(self) -> str:
        return notebook.capture(self)


def keep(target: Target, *, where: Selector = None) -> Capture:
    """Keep the raw values: [L, B, T, F], or [B, T, F] of one layer; zero where not selected.

    Sites of the vision side are kept as they are computed, tile by tile: [L, I, P, F]. One layer
    is carried through the scan, not stacked.

    Args:
      target: A site or an address.
      where: A token selector or a mask bool[B, T]; all tokens by default.
    """
    return Capture("keep", Address.of(target), tokens.of(where))


def mean(target: Target, *, where: Selector = None) -> Capture:
    """Average over the selected tokens of each row: float32[L, B, F].

    On the vision side these are the tokens of all pictures that the row reads. A row without a
    selected token has no mean: an error where the batch is known, NaN under `jit`. Rows that only
    fill up the batch are 0.

    Args:
      target: See `keep`.
      where: See `keep`.
    """
    return Capture("mean", Address.of(target), tokens.of(where))


def mass(target: Target, *, on: Selector, where: Selector = None) -> Capture:
    """Average the attention that the selected queries pay to some keys: float32[L, B, N].

    Args:
      target: `sites.lm.attn.pattern` or `sites.vision.attn.pattern`, or layers and heads of it.
      on: The keys; in a row that has none of them the mass is 0.
      where: The queries; a row without any is treated as by `mean`.
    """
    return Capture("mass", Address.of(target), tokens.of(where), on=tokens.of(on))


def attention(target: Target, *, where: Selector = None) -> Capture:
    """Average the attention that the selected queries pay to each key: float32[L, B, N, S].

    `attention_maps.picture_maps` lays the keys out on the grids of the pictures.

    Args:
      target: See `mass`.
      where: The queries; a row without any is an error where the batch is known, and 0 under `jit`.
    """
    return Capture("attention", Address.of(target), tokens.of(where))


def stats(
    target: Target, *, by: str | Sequence[str] | None = None, where: Selector = None
) -> Capture:
    """Compute statistics over rows and tokens, see `results.Stats`.

    The tokens of questions are counted: on the vision side a tile counts once for each row that
    reads it, whether or not rows share it. Under `jit`, a selector that selects nothing gives 0
    tokens.

    Args:
      target: See `keep`.
      by: `tokens.kind` to group them by kind of token, or some names of it.
      where: See `keep`.
    """
    return Capture("stats", Address.of(target), tokens.of(where), _kinds(target, by))


def lens(
    target: Target,
    *,
    k: int = 10,
    by: str | Sequence[str] | None = None,
    where: Selector = None,
) -> Capture:
    """Apply the logit lens, see `results.Lens`.

    With `by` the result is its entropy, summed by row and kind, see `results.Entropy`.

    Args:
      target: See `keep`.
      k: How many of the most probable words to name, at most those of the vocabulary.
      by: `tokens.kind`, or some names of it.
      where: See `keep`.
    """
    if k < 1:
        raise ValueError(f"lens k={k}: a lens names one word or more")
    form = "lens" if by is None else "entropy"
    return Capture(form, Address.of(target), tokens.of(where), _kinds(target, by), k)


def top(target: Target, *, k: int = 20, where: Selector = None) -> Capture:
    """Keep the k tokens on which each unit is strongest, see `top_tokens.Top`.

    On the vision side a tile that several rows read belongs to the first of them.

    Args:
      target: A site with one value for each unit and token, or an address.
      k: How many tokens to keep of each unit.
      where: See `keep`.
    """
    _check_k("top", k)
    return Capture("top", Address.of(target), tokens.of(where), k=k)


def bottom(target: Target, *, k: int = 20, where: Selector = None) -> Capture:
    """Keep the k tokens on which each unit is weakest; see `top`."""
    _check_k("bottom", k)
    return Capture("bottom", Address.of(target), tokens.of(where), k=k)


def sample(
    target: Target,
    *,
    k: int = 5,
    edges: Sequence[float] | None = None,
    where: Selector = None,
) -> Capture:
    """Keep k tokens of each unit for each range of its values, see `top_tokens.Top`.

    The tokens are drawn by a hash of the value and the token's place, so that they depend neither
    on the batches nor on a seed.

    Args:
      target: See `top`.
      k: How many tokens to keep of each unit and range.
      edges: The edges of the ranges; `top_tokens.EDGES` by default.
      where: See `keep`.
    """
    _check_k("sample", k)
    return Capture("sample", Address.of(target), tokens.of(where), k=k, edges=_edges(edges))


def histogram(
    target: Target,
    *,
    edges: Sequence[float] | None = None,
    by: str | Sequence[str] | None = None,
    where: Selector = None,
) -> Capture:
    """Count how often each unit has a value in each bin, see `top_tokens.Histogram`.

    Tokens are counted as by `stats`.

    Args:
      target: See `top`.
      edges: The edges of the bins; `top_tokens.EDGES` by default.
      by: See `stats`.
      where: See `keep`.
    """
    kinds, where = _kinds(target, by), tokens.of(where)
    return Capture("histogram", Address.of(target), where, kinds, edges=_edges(edges))


def _check_k(form: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{form} k={k}: keep one token of each unit or more")


def _edges(edges: Sequence[float] | None) -> Float[np.ndarray, " n"]:
    array = np.asarray(top_tokens.EDGES if edges is None else edges, np.float32)
    if array.ndim != 1 or not array.size or not (np.diff(array) > 0).all():
        raise ValueError(f"edges={short(edges)}: the edges of bins are numbers that increase")
    return array


def _kinds(target: Target, by: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the kinds to group by, in the order of the site's table."""
    if by is None:
        return None
    by = (by,) if isinstance(by, str) else tuple(by)
    site = Address.of(target).site
    kinds = site.entry(TOKEN_KINDS)
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
      form: A name of `FORMS`. Static.
      site: Where it reads. Static.
      by: The kinds of token that the result is grouped by, or None. Static.
      k: How many words a lens names. Static.
      count: How many layers are captured. Static.
      single: Whether the layer axis is dropped at the end. Static.
      slots: The slot that carries each layer's result, int32[L], `count` for layers that are not
        captured; None stacks all layers.
      order: The slots of the captured layers, int32[count]; a layer that is listed twice has one
        slot.
      absent: Which of the captured layers the model does not have, bool[count]; only traced indices
        can be out of range unnoticed.
      units: The units that are brought back, int32[n], or None for all.
      tokens: The tokens that are read, bool[B, T].
      kind: The kind of each token, int8[B, T].
      on: The keys of an attention mass, bool[B, S], or None.
      rows: False for rows of the batch that only fill it up, bool[B].
      readers: Which rows read each tile, bool[B, I], where the site has tiles in place of rows.
      edges: The edges of bins, float32[bins - 1], or None.
      places: Where the tokens are in the data, where the form needs it; or None.
    """

    form: str = dataclasses.field(metadata={"static": True})
    site: sites.Site = dataclasses.field(metadata={"static": True})
    by: tuple[str, ...] | None = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    single: bool = dataclasses.field(metadata={"static": True})
    slots: Int[AnyArray, " L"] | None
    order: Int[AnyArray, " count"] | None
    absent: Bool[AnyArray, " count"] | None
    units: Int[AnyArray, " n"] | None
    tokens: Bool[AnyArray, "B T"]
    kind: Int[AnyArray, "B T"]
    on: Bool[AnyArray, "B S"] | None
    rows: Bool[AnyArray, " B"]
    readers: Bool[AnyArray, "B I"] | None
    edges: Float[AnyArray, " n"] | None = None
    places: top_tokens.Places | None = None

    def read(self, x: Shaped[Array, ...], lens: Callable | None) -> Any:
        """Return the result of one layer.

        Args:
          x: The tensor of the site in this layer.
          lens: A function from states [..., D] to logits float32[..., V].
        """
        if self.units is not None:
            missing = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
            x = jnp.take(x, self.units, self.site.unit_axis, mode="fill", fill_value=missing)
        return FORMS[self.form].read(self, x, lens)

    def finish(self, carried: Any) -> Any:
        """Return the carried slots in the order of the capture; absent layers are NaN, or 0."""
        order, absent = self.order, self.absent
        assert order is not None and absent is not None, "only a carried capture has slots"

        def pick(array):
            array = array[order]
            missing = jnp.nan if jnp.issubdtype(array.dtype, jnp.inexact) else 0
            is_absent = absent.reshape(-1, *(1,) * (array.ndim - 1))
            array = jnp.where(is_absent, jnp.asarray(missing, array.dtype), array)
            return array[0] if self.single else array

        return jax.tree.map(pick, carried)


def _check_site(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    address = capture.address
    site_rules.check_capture(capture.form, address.site, address.units.form == "all")


def _check_lens(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    _check_site(capture, shapes)
    site, words = capture.address.site, shapes[sites.logits.name].shape[-1]
    if capture.form == "lens" and capture.k > words:
        raise ValueError(f"lens k={capture.k} of {site.name}: the vocabulary has {words} words")


def _accept(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    """Accept every site."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to reduce the tensor of a site, with everything that other modules must know of it.

    `grammar.CAPTURES` says how text writes the forms that it can express.

    Attributes:
      read: The reduction inside the pass, (bound capture, x, lens) -> the result of one layer.
      build: The public function that makes such a capture; None where users have none.
      check: Raises an error where the form does not read the site, (capture, shapes).
      by: What the rows of a result are: a "row" of the batch; a "token", of which there
        are as many as at the site, on the vision side tile by tile; or the whole "batch".
      merges: Whether results have `wide` and `merge`, for a data set of any size.
      needs_every_row: Whether a row without a selected token has no result.
      needs_a_token: Whether a capture must select a token.
      needs_places: Whether the result tells where tokens are in the data.
    """

    read: Callable[[BoundCapture, Shaped[Array, ...], Callable | None], Any]
    build: Callable[..., Capture] | None = None
    check: Callable[[Capture, dict[str, SiteShape]], None] = _accept
    by: Literal["row", "token", "batch"] = "row"
    merges: bool = False
    needs_every_row: bool = False
    needs_a_token: bool = True
    needs_places: bool = False


def _keeping_tokens(read: Callable, build: Callable[..., Capture]) -> Form:
    return Form(read, build, _check_site, "batch", merges=True, needs_places=True)


FORMS: dict[str, Form] = {
    "finite": Form(reductions.read_finite, by="batch", needs_a_token=False),
    "keep": Form(reductions.read_keep, keep, by="token"),
    "mean": Form(reductions.read_mean, mean, _check_site, needs_every_row=True),
    "mass": Form(reductions.read_mass, mass, _check_site, needs_every_row=True),
    "attention": Form(
        attention_maps.read_attention, attention, _check_site, "token", needs_every_row=True
    ),
    "stats": Form(reductions.read_stats, stats, _check_site, "batch", merges=True),
    "lens": Form(reductions.read_lens, lens, _check_lens, "token"),
    "entropy": Form(reductions.read_entropy, check=_check_lens, merges=True),
    "histogram": Form(reductions.read_histogram, histogram, _check_site, "batch", merges=True),
    "top": _keeping_tokens(top_tokens.read_top("largest"), top),
    "bottom": _keeping_tokens(top_tokens.read_top("smallest"), bottom),
    "sample": _keeping_tokens(top_tokens.read_sample, sample),
}


def join(
    captures: dict[str, Capture], parts: Sequence[dict[str, Any]], batches: Sequence[Batch]
) -> dict[str, Any]:
    """Join the captures of several batches into one, on the host.

    Statistics are added up. All other results are concatenated row by row, without the rows that
    only fill up a batch; `keep` and `lens` of the vision side are concatenated tile by tile.

    Args:
      captures: The captures, by name.
      parts: Their results, by name, for each batch.
      batches: The batches.
    """

    def join_one(name: str, capture: Capture):
        results = [part[name] for part in parts]
        form = FORMS[capture.form]
        if form.by == "batch":
            return functools.reduce(lambda a, b: a.merge(b), (result.wide() for result in results))
        site = capture.address.site
        tiled = form.by == "token" and site.module not in ("lm", "logits")
        real = [np.asarray(b.is_real_tile if tiled else b.valid.any(-1)) for b in batches]
        axis = int(site.stacked and capture.address.layers.form != "one")
        return jax.tree.map(lambda *arrays: _concatenate_real(arrays, real, axis), *results)

    return {name: join_one(name, capture) for name, capture in captures.items()}


def _concatenate_real(arrays, real: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate the real entries of an axis of each array."""
    parts = [np.compress(keep, a, axis) for a, keep in zip(arrays, real, strict=True)]
    return np.concatenate(parts, axis)
