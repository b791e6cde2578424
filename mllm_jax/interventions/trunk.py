"""The trunk of a sweep: one clean pass, and how far the lanes share it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mllm_jax import sites
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions import run as run_
from mllm_jax.interventions.edits import BoundEdit
from mllm_jax.interventions.tap import Resume, Taps

BUDGET = 2**30  # bytes of the states that are kept
PREFIX = 16  # tokens: a shared prefix is a multiple of this, so that programs are few
_STATE = "what enters a layer"


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What all lanes have in common, computed once.

    Attributes:
      batch: with the vision features, where no edit changes them.
      first: int[R], the first layer of the module that each lane must run.
      module: whose lower layers are shared; None for none.
      layers: how many the module has.
      every: the layers between two states that are kept.
      states: what enters each of these layers, [layers / every, B, T, D].
      captured: by the captures, in a pass without edits.
      prefix: tokens that no lane reaches. past: the LM's cache of them, or None.
    """

    batch: Any
    first: np.ndarray
    module: str | None = None
    layers: int = 1
    every: int = 1
    states: Any = None
    captured: Any = None
    prefix: int = 0
    past: Any = None

    def resume(self, start: int) -> dict[str, Resume]:
        """Where lanes go on that leave the layers below `start` clean."""
        if self.module is None:
            return {}
        number = start // self.every
        start = np.int32(number * self.every)
        return {self.module: Resume(start, self.states[number], self.captured)}


def grow(model, batch, bound, asked, logits: str) -> Trunk:
    """The clean pass, as far as the lanes share it.

    Args:
      bound: the edits of each lane. asked: the captures.
      logits: as in `run`.
    """
    shapes = run_.site_shapes(model, batch)
    edited = {edit.site for edits in bound for edit in edits}
    modules = {site.module for site in edited} - {"logits"}
    reads_vision = any(c.site.module == "vision" for c in asked.values())
    if "vision" in modules:
        module = "vision" if sites.vision.embed not in edited else None
    else:
        module = "lm" if modules <= {"lm"} and sites.lm.embed not in edited else None
        if batch.features is None and not reads_vision and len(batch.real):
            batch = batch.replace(features=_features(model, batch))
    if module is None or f"{module}.resid_pre" not in shapes:
        return Trunk(batch, np.zeros(len(bound), int))
    site = sites.get(f"{module}.resid_pre")
    layers = shapes[site.name].layers
    first = np.array([_first(edits, module, layers) for edits in bound])
    prefix = prefix_length(batch, bound, asked, logits) if module == "lm" else 0
    size = int(np.prod(shapes[site.name].shape)) * np.dtype(shapes[site.name].dtype).itemsize
    every = max(1, -(-layers * size // BUDGET))
    state = run_.bind(model, batch, None, {_STATE: captures_.keep(site[0:layers:every])})[1][_STATE]
    state = dataclasses.replace(state, tokens=np.ones_like(state.tokens))  # padding is carried on
    states, captured, past = _clean(
        model, batch, asked | {_STATE: state}, module=module, prefix=prefix
    )
    return Trunk(batch, first, module, layers, every, states, captured, prefix, past)


@functools.partial(jax.jit, static_argnames=("module", "prefix"))
def _clean(model, batch, captures, *, module, prefix):
    inside = {n: c for n, c in captures.items() if c.site.module == module and c.site.stacked}
    taps = Taps((), inside)
    past = None
    if module == "vision":
        model.features(batch, taps)
    else:
        _, cache = model(batch, taps)
        past = cache.first(prefix) if prefix else None
    states = taps.captured.pop(_STATE)
    return states[:, :, prefix:], taps.captured, past


@jax.jit
def _features(model, batch):
    return model.features(batch, Taps())


def _first(edits: tuple[BoundEdit, ...], module: str, layers: int) -> int:
    """The first layer of the module that an edit of this lane reaches."""
    stacked = [e.units for e in edits if e.site.module == module and e.site.stacked]
    reached = [np.flatnonzero(np.asarray(units).any(-1)) for units in stacked]
    # Above the last layer the state is not kept: run that layer again.
    return int(min((at[0] for at in reached), default=layers - 1))


def prefix_length(batch, bound, asked, logits: str) -> int:
    """How many tokens at the start no lane changes and no capture reads."""
    whole = any(c.form in ("keep", "lens") for c in asked.values())
    outside = any(c.site.module not in ("lm", "logits") for c in asked.values())
    if logits == "all" or whole or outside or batch.segment is not None:
        return 0
    tokens = [np.asarray(c.tokens) for c in asked.values()]
    places = [np.asarray(batch.last)]
    for edit in (edit for edits in bound for edit in edits):
        tokens.append(np.asarray(edit.tokens))
        if "at" in edit.along:  # a patch reads elsewhere than it writes
            places.append(np.asarray(edit.along["at"])[np.asarray(edit.tokens)])
    places += [np.nonzero(mask)[1] for mask in tokens]
    return int(np.concatenate(places).min()) // PREFIX * PREFIX
