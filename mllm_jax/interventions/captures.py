"""Captures: what a forward pass returns, reduced where it is computed.

`forms` registers every way to reduce the tensor of a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from mllm_jax import notebook, tokens
from mllm_jax.arguments import require_whole, type_error
from mllm_jax.files import shown
from mllm_jax.interventions import top_tokens
from mllm_jax.sites import Address, Target
from mllm_jax.tokens import Selector
from mllm_jax.typing import AnyArray, Float

Heads = Literal["each", "mean"]

# The kinds that the tokens of a module or a site can have: results are grouped by them.
TOKEN_KINDS = {
    "vision": ("cls", "image"),
    "qformer": ("query", "system", "question"),
    "qformer.mlp.act": ("system", "question"),
    "qformer.query_mlp.act": ("query",),
    "qformer.cross.pattern": ("query",),
    "projector": ("cls", "image"),
    "lm": ("system", "question", "image", "newline", "answer"),
    "logits": ("system", "question", "image", "newline", "answer"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """What to read at a site. Made by `keep`, `mean`, `mass`, `stats`, `lens`, `top`, ...

    Attributes:
      form: The reduction, a name of `forms.FORMS`. Static.
      address: The site with the layers and units that are read.
      where: The tokens that are read.
      by: The kinds of token that the result is grouped by, or None. Static.
      k: The number of words of a lens, or of units that a sparse form keeps. Static.
      on: The keys of an attention.
      edges: The edges of the bins of a histogram or a sample, float32[bins - 1].
      heads: Whether an attention is of each head or their mean. Static.
    """

    form: str = dataclasses.field(metadata={"static": True})
    address: Address
    where: tokens.Where
    by: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    k: int = dataclasses.field(default=0, metadata={"static": True})
    on: tokens.Where | None = None
    edges: Float[AnyArray, " n"] | None = None
    heads: Heads = dataclasses.field(default="each", metadata={"static": True})

    def _repr_html_(self) -> str:
        return notebook.capture(self)


def keep(target: Target, *, k: int | None = None, where: Selector = None) -> Capture:
    """Keep the raw values: [L, B, T, F], or [B, T, F] of one layer; zero where not selected.

    With `k` only the k largest units of each token are kept, see `results.Sparse`: the latents of a
    dictionary are mostly zero.

    Sites of the vision side are kept as they are computed, tile by tile: [L, I, P, F]. One layer
    is carried through the scan, not stacked.

    Args:
      target: A site or an address.
      k: The number of units of each token to keep; all by default.
      where: A token selector or a mask bool[B, T]; all tokens by default.
    """
    if k is None:
        return Capture("keep", Address.of(target), tokens.of(where))
    k = require_whole("keep k", k)
    return Capture("sparse", Address.of(target), tokens.of(where), k=k)


def mean(target: Target, *, where: Selector = None) -> Capture:
    """Average over the selected tokens of each row: float32[L, B, F].

    On the vision side these are the tokens of all pictures that the row reads. For a row without a
    selected token it raises an error, or is NaN under `jit`. Rows that only pad the batch are 0.

    Args:
      target: See `keep`.
      where: See `keep`.
    """
    return Capture("mean", Address.of(target), tokens.of(where))


def mass(
    target: Target,
    *,
    on: Selector = None,
    by: str | Sequence[str] | Callable | None = None,
    where: Selector = None,
    heads: Heads = "each",
) -> Capture:
    """Average the attention of the selected queries to some keys: float32[L, B, N].

    With `by` the keys are grouped, see `attention_maps.Mass`.

    Args:
      target: An attention pattern of a module, or layers and heads of it.
      on: The keys; the mass is 0 in a row without any of them.
      by: `tokens.kind`, or some names of it, or "tile": the image tiles of each row.
      where: The queries; a row without any is treated as by `mean`.
      heads: "mean" averages over the heads, and the result has no axis N.

    Raises:
      ValueError: Neither `on` nor `by` is given.
    """
    if on is None and by is None:
        raise ValueError("mass needs the option on= or by=: the mass of all keys is 1")
    if by in ("tile", ("tile",), tokens.tile):
        groups: tuple[str, ...] | None = ("tile",)
    else:
        groups = _kinds(target, by, of_keys=True)  # type: ignore[arg-type]  # no function is left
    return Capture(
        "mass", Address.of(target), tokens.of(where), groups, on=tokens.of(on), heads=_heads(heads)
    )


def attention(target: Target, *, where: Selector = None, heads: Heads = "each") -> Capture:
    """Average the attention of the selected queries to each key: float32[L, B, N, S].

    Args:
      target: See `mass`.
      where: The queries; a row without any raises an error, or is 0 under `jit`.
      heads: See `mass`.
    """
    return Capture("attention", Address.of(target), tokens.of(where), heads=_heads(heads))


def attention_map(
    target: Target,
    *,
    to: Selector = None,
    on: Selector = tokens.image,
    heads: Heads = "each",
) -> Capture:
    """Map the attention of the selected queries over pictures, see `attention_maps.AttentionMap`.

    It is the mean over the queries. In a Q-Former, `sites.qformer.cross.pattern` is the attention
    of the queries to patches.

    Args:
      target: See `mass`.
      to: The queries; see `where` of `attention`.
      on: The keys, image tokens by default.
      heads: See `mass`.
    """
    where, keys = tokens.of(to), tokens.of(on)
    return Capture("attention_map", Address.of(target), where, on=keys, heads=_heads(heads))


def rollout(target: Target, *, to: Selector = None, on: Selector = None) -> Capture:
    """Roll out attention from the first layer to each of the target: see `AttentionMap`.

    Abnar & Zuidema 2020: attention, averaged over the heads of the address, is mixed equally with
    the identity for the residual, and multiplied through the layers. The pass carries one product
    [B, T, T] from layer to layer.

    Args:
      target: The pattern of a module, and the layers at which the rollout is read; it includes all
        layers up to them.
      to: See `attention_map`.
      on: The keys, at the input of the first layer.
    """
    where, keys = tokens.of(to), tokens.of(on)
    return Capture("rollout", Address.of(target), where, on=keys, heads="mean")


def stats(
    target: Target, *, by: str | Sequence[str] | None = None, where: Selector = None
) -> Capture:
    """Compute statistics over rows and tokens, see `results.Stats`.

    Counts refer to questions: on the vision side a tile is counted once for each row that reads it,
    whether or not rows share it. Under `jit`, a selector that selects nothing gives 0 tokens.

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
      k: The number of most probable words to return, at most the size of the vocabulary.
      by: `tokens.kind`, or some names of it.
      where: See `keep`.
    """
    k = require_whole("lens k", k)
    form = "lens" if by is None else "entropy"
    return Capture(form, Address.of(target), tokens.of(where), _kinds(target, by), k)


def distribution(
    target: Target, *, by: str | Sequence[str] | None = None, where: Selector = None
) -> Capture:
    """Average the logit lens's distribution over words, see `results.Distribution`.

    For the last residual it is the mean distribution of the next token.

    Args:
      target: See `lens`.
      by: `tokens.kind`, or some names of it.
      where: See `keep`.
    """
    return Capture("distribution", Address.of(target), tokens.of(where), _kinds(target, by))


def top(target: Target, *, k: int = 20, where: Selector = None) -> Capture:
    """Keep the k tokens on which each unit has its largest values, see `top_tokens.Top`.

    On the vision side a tile that several rows read belongs to the first of them.

    Args:
      target: A site with one value for each unit and token, or an address.
      k: The number of tokens to keep for each unit.
      where: See `keep`.
    """
    k = require_whole("top k", k)
    return Capture("top", Address.of(target), tokens.of(where), k=k)


def bottom(target: Target, *, k: int = 20, where: Selector = None) -> Capture:
    """Keep the k tokens on which each unit has its smallest values; see `top`."""
    k = require_whole("bottom k", k)
    return Capture("bottom", Address.of(target), tokens.of(where), k=k)


def sample(
    target: Target,
    *,
    k: int = 5,
    edges: Sequence[float] | None = None,
    where: Selector = None,
) -> Capture:
    """Keep k tokens of each unit for each range of its values, see `top_tokens.Top`.

    The tokens are drawn by a hash of the value and the token's position in its example, so that
    they depend neither on the batches nor on a seed. Tokens of equal value and position, such as
    those of a shared system prompt, are drawn together, earlier examples first.

    Args:
      target: See `top`.
      k: The number of tokens to keep for each unit and range.
      edges: The edges of the ranges; `top_tokens.EDGES` by default.
      where: See `keep`.
    """
    k = require_whole("sample k", k)
    return Capture("sample", Address.of(target), tokens.of(where), k=k, edges=_edges(edges))


def histogram(
    target: Target,
    *,
    edges: Sequence[float] | None = None,
    by: str | Sequence[str] | None = None,
    where: Selector = None,
) -> Capture:
    """Count how often each unit has a value in each bin, see `top_tokens.Histogram`.

    Tokens are counted as in `stats`.

    Args:
      target: See `top`.
      edges: The edges of the bins; `top_tokens.EDGES` by default.
      by: See `stats`.
      where: See `keep`.
    """
    kinds, where = _kinds(target, by), tokens.of(where)
    return Capture("histogram", Address.of(target), where, kinds, edges=_edges(edges))


def _edges(edges: Sequence[float] | None) -> Float[np.ndarray, " n"]:
    try:
        array = np.asarray(top_tokens.EDGES if edges is None else edges, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, np.float32)
    increase = array.ndim == 1 and array.size > 0 and (np.diff(array) > 0).all()
    if not increase or np.isnan(array).any():
        raise ValueError(f"edges={shown(edges)}: the edges of bins must be increasing numbers")
    return array


def _heads(heads: str) -> Heads:
    if heads not in ("each", "mean"):
        raise ValueError(f'heads="{heads}" is neither "each" nor "mean"')
    return "each" if heads == "each" else "mean"


def _kinds(
    target: Target, by: str | Sequence[str] | None, *, of_keys: bool = False
) -> tuple[str, ...] | None:
    """Return the kinds to group by, in the order of the site's table."""
    if by is None:
        return None
    by = (by,) if isinstance(by, str) else by
    if not isinstance(by, Sequence) or not all(isinstance(name, str) for name in by):
        raise type_error("by", by, "tokens.kind, or some names of it such as 'image'")
    site = Address.of(target).site
    kinds = (site.key_entry if of_keys else site.entry)(TOKEN_KINDS)
    if not set(by) <= set(tokens.kind) or not set(by) & set(kinds):
        module = site.keys or site.module if of_keys else site.module
        raise ValueError(f"by={', '.join(by)}: kinds of {module} tokens are {', '.join(kinds)}")
    return tuple(kind for kind in kinds if kind in by)
