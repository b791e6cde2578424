"""Forms of captures: every way to reduce the tensor of a site, and what passes need to know.

`FORMS` registers them; `reductions`, `top_tokens` and `attention_maps` hold the computations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites
from mllm_jax.batch import Batch
from mllm_jax.interventions import attention_maps, captures, reductions, site_rules, top_tokens
from mllm_jax.interventions.bound_capture import BoundCapture, absent_value
from mllm_jax.interventions.captures import Capture
from mllm_jax.sites import SiteShape
from mllm_jax.typing import Array, Bool, Shaped


def _check_site(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    address = capture.address
    site_rules.check_capture(capture.form, address.site, address.units.form == "all")


def _check_lens(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    _check_site(capture, shapes)
    site, words = capture.address.site, shapes[sites.logits.name].shape[-1]
    if capture.form == "lens" and capture.k > words:
        raise ValueError(f"lens k={capture.k} of {site.name}: the vocabulary has {words} words")


def _check_sparse(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    _check_site(capture, shapes)
    site = capture.address.site
    width = shapes[site.name].shape[-1]
    if capture.k > width:
        raise ValueError(f"keep k={capture.k} of {site.name}: it has {width} units")


def _accept(capture: Capture, shapes: dict[str, SiteShape]) -> None:
    """Accept every site."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to reduce the tensor of a site, with everything that other modules need to know.

    `grammar.CAPTURES` defines the syntax of the forms that text can express.

    Attributes:
      read: The reduction inside the pass, (bound capture, x, lens) -> the result of one layer.
      build: The public function that makes such a capture; None if there is none.
      check: (capture, shapes) -> None; raises an error if the form does not read the site.
      by: The unit of the results: a "row" of the batch; a "token" of the site, on the vision side
        tile by tile; or the whole "batch".
      merges: Whether results have `wide` and `merge`, for a data set of any size.
      needs_every_row: Whether a row without a selected token has no result.
      needs_a_token: Whether a capture must select a token.
      needs_places: Whether the result contains the positions of tokens in the data.
      needs_keys: Whether it reads the keys of an attention.
      start: (bound capture) -> the state carried into the first layer; None for forms that read
        each layer separately.
      carry: (bound capture, x) -> the state carried to the next layer.
      complete: (bound capture, results of all captured layers) -> the result.
      join: (results of several batches, which rows of each are real, axis of the rows) -> the
        joined result; by default each of their arrays is concatenated.
    """

    read: Callable[[BoundCapture, Shaped[Array, ...], Callable | None], Any]
    build: Callable[..., Capture] | None = None
    check: Callable[[Capture, dict[str, SiteShape]], None] = _accept
    by: Literal["row", "token", "batch"] = "row"
    merges: bool = False
    needs_every_row: bool = False
    needs_a_token: bool = True
    needs_places: bool = False
    needs_keys: bool = False
    start: Callable[[BoundCapture], Any] | None = None
    carry: Callable[[BoundCapture, Shaped[Array, ...]], Any] | None = None
    complete: Callable[[BoundCapture, Any], Any] | None = None
    join: Callable[[Sequence[Any], Sequence[Bool[np.ndarray, " n"]], int], Any] | None = None


_of_rows = functools.partial(Form, check=_check_site, needs_every_row=True)
_map = functools.partial(
    _of_rows, by="token", needs_keys=True, complete=attention_maps.with_keys,
    join=attention_maps.AttentionMap.join,
)  # fmt: skip
_of_data = functools.partial(Form, check=_check_site, by="batch", merges=True)


FORMS: dict[str, Form] = {
    "finite": Form(reductions.read_finite, by="batch", needs_a_token=False),
    "keep": Form(reductions.read_keep, captures.keep, by="token"),
    "sparse": Form(reductions.read_sparse, check=_check_sparse, by="token"),
    "mean": _of_rows(reductions.read_mean, captures.mean),
    "mass": _of_rows(reductions.read_mass, captures.mass, needs_keys=True),
    "attention": _of_rows(attention_maps.read_attention, captures.attention, by="token"),
    "attention_map": _map(attention_maps.read_attention, captures.attention_map),
    "rollout": _map(
        attention_maps.read_rollout,
        captures.rollout,
        start=attention_maps.start_rollout,
        carry=attention_maps.roll_out,
    ),
    "lens": Form(reductions.read_lens, captures.lens, _check_lens, "token"),
    "entropy": Form(reductions.read_entropy, check=_check_lens, merges=True),
    "distribution": Form(
        reductions.read_distribution, captures.distribution, _check_lens, "batch", merges=True
    ),
    "stats": _of_data(reductions.read_stats, captures.stats),
    "histogram": _of_data(reductions.read_histogram, captures.histogram),
    "top": _of_data(top_tokens.read_top("largest"), captures.top, needs_places=True),
    "bottom": _of_data(top_tokens.read_top("smallest"), captures.bottom, needs_places=True),
    "sample": _of_data(top_tokens.read_sample, captures.sample, needs_places=True),
}


def read_layer(capture: BoundCapture, x: Shaped[Array, ...], lens: Callable | None) -> Any:
    """Return the result of one layer.

    Args:
      capture: The capture.
      x: The tensor of the site in this layer.
      lens: A function from states [..., D] to logits float32[..., V].
    """
    return FORMS[capture.form].read(capture, _take_units(capture, x), lens)


def carry(capture: BoundCapture, x: Shaped[Array, ...]) -> Any:
    """Return the state that the capture carries to the next layer; None if it carries none."""
    carry_on = FORMS[capture.form].carry
    return None if carry_on is None else carry_on(capture, _take_units(capture, x))


def states(named: dict[str, BoundCapture]) -> dict[str, Any]:
    """Return the states that captures carry into the first layer, by name, if they carry one."""
    starts = {name: FORMS[capture.form].start for name, capture in named.items()}
    return {name: start(named[name]) for name, start in starts.items() if start is not None}


def complete(named: dict[str, BoundCapture], results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of captures from those of their layers, by name."""
    steps = {name: FORMS[capture.form].complete for name, capture in named.items()}
    finished = {n: step(named[n], results[n]) for n, step in steps.items() if step is not None}
    return results | finished


def _take_units(capture: BoundCapture, x: Shaped[Array, ...]) -> Shaped[Array, ...]:
    if capture.units is None:
        return x
    axis = capture.site.unit_axis
    return jnp.take(x, capture.units, axis, mode="fill", fill_value=absent_value(x))


def join(
    named: dict[str, Capture], parts: Sequence[dict[str, Any]], batches: Sequence[Batch]
) -> dict[str, Any]:
    """Join the captures of several batches into one, on the host.

    Statistics are added. All other results are concatenated row by row, without the rows that only
    pad a batch; `keep` and `lens` of the vision side are concatenated tile by tile.

    Args:
      named: The captures, by name.
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
        real = [np.asarray(b.is_real_tile if tiled else b.valid_row) for b in batches]
        axis = int(site.stacked and capture.address.layers.form != "one")
        if form.join is not None:
            return form.join(results, real, axis)
        return jax.tree.map(lambda *arrays: _concatenate_real(arrays, real, axis), *results)

    return {name: join_one(name, capture) for name, capture in named.items()}


def _concatenate_real(arrays, real: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate the real entries of an axis of each array."""
    parts = [np.compress(keep, a, axis) for a, keep in zip(arrays, real, strict=True)]
    return np.concatenate(parts, axis)
