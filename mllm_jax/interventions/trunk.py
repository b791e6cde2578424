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
from mllm_jax.models.cache import Cache
from mllm_jax.sharding import mesh

BUDGET = 2**30  # bytes of the states that are kept
PREFIX = 16  # tokens: a shared prefix is a multiple of this, so that programs are few
_STATE = "what enters a layer"


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What all lanes have in common, computed once.

    Attributes:
      batch: with the vision features, where no edit changes them.
      first: int[R], the first layer of the module that each lane must run.
      prefix: int[R], tokens that each lane leaves clean.
      module: whose lower layers are shared; None for none.
      layers: how many the module has.
      every: the layers between two states that are kept.
      states: what enters each of these layers, [layers / every, B, T, D].
      captured: by the captures, in a pass without edits.
      past: the LM's cache of the longest prefix, or None.
    """

    batch: Any
    first: np.ndarray
    prefix: np.ndarray
    module: str | None = None
    layers: int = 1
    every: int = 1
    states: Any = None
    captured: Any = None
    past: Any = None

    def resume(self, start: int, prefix: int) -> tuple[dict[str, Resume], Cache | None]:
        """Where lanes go on that leave the layers below `start` clean, and what they look back at.

        Args:
          start: a layer. prefix: tokens, the same for all these lanes.
        """
        if self.module is None:
            return {}, None
        number = start // self.every
        x = self.states[number][:, prefix:]
        at = Resume(np.int32(number * self.every), x, self.captured)
        return {self.module: at}, self.past.first(prefix) if prefix else None

    def chunks(self, size: int) -> list[np.ndarray]:
        """The lanes in chunks that have a prefix in common and begin at near layers."""
        found = []
        for prefix in np.unique(self.prefix):
            lanes = np.flatnonzero(self.prefix == prefix)
            lanes = lanes[np.argsort(self.first[lanes], kind="stable")]
            found += [lanes[i : i + size] for i in range(0, len(lanes), size)]
        return found

    def cost(self, size: int) -> int:
        """Layers x tokens that chunks of this size compute, each with one lane more than it has."""
        T = self.batch.ids.shape[1]
        return sum(
            (size + 1) * int(self.layers - self.first[lanes].min()) * int(T - self.prefix[lanes[0]])
            for lanes in self.chunks(size)
        )


def whole(batch, lanes: int) -> Trunk:
    """A trunk of nothing: every lane runs the whole pass."""
    return Trunk(batch, np.zeros(lanes, int), np.zeros(lanes, int))


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
        return whole(batch, len(bound))
    site = sites.get(f"{module}.resid_pre")
    layers = shapes[site.name].layers
    first = np.array([_first(edits, module, layers) for edits in bound])
    prefix = np.zeros_like(first)
    if module == "lm":
        prefix = np.array([prefix_length(batch, edits, asked, logits) for edits in bound])
    size = int(np.prod(shapes[site.name].shape)) * np.dtype(shapes[site.name].dtype).itemsize
    every = max(1, -(-layers * size // BUDGET))
    state = run_.bind(model, batch, None, {_STATE: captures_.keep(site[0:layers:every])})[1][_STATE]
    state = dataclasses.replace(state, tokens=np.ones_like(state.tokens))  # padding is carried on
    states, captured, past = _clean(
        model, batch, asked | {_STATE: state}, module=module, prefix=int(prefix.max())
    )
    return Trunk(batch, first, prefix, module, layers, every, states, captured, past)


@functools.partial(jax.jit, static_argnames=("module", "prefix"))
def _clean(model, batch, captures, *, module, prefix):
    inside = {n: c for n, c in captures.items() if c.site.module == module and c.site.stacked}

    def clean(_, model, batch, inside):
        taps = Taps((), inside)
        past = None
        if module == "vision":
            model.features(batch, taps)
        else:
            _, cache = model(batch, taps)
            past = cache.first(prefix) if prefix else None
        return taps.captured.pop(_STATE), taps.captured, past

    return mesh.spread(clean, None, model, batch, inside)


@jax.jit
def _features(model, batch):
    return mesh.spread(lambda _, model, batch: model.features(batch, Taps()), None, model, batch)


def _first(edits: tuple[BoundEdit, ...], module: str, layers: int) -> int:
    """The first layer of the module that an edit of this lane reaches."""
    stacked = [e.units for e in edits if e.site.module == module and e.site.stacked]
    reached = [np.flatnonzero(np.asarray(units).any(-1)) for units in stacked]
    # Above the last layer the state is not kept: run that layer again.
    return int(min((at[0] for at in reached), default=layers - 1))


def prefix_length(batch, edits: tuple[BoundEdit, ...], asked, logits: str) -> int:
    """How many tokens at the start no edit changes and no capture reads."""
    whole = any(c.form in ("keep", "lens") for c in asked.values())
    outside = any(c.site.module not in ("lm", "logits") for c in asked.values())
    if logits == "all" or whole or outside or batch.segment is not None:
        return 0
    tokens = [np.asarray(c.tokens) for c in asked.values()]
    places = [np.asarray(batch.last)]
    for edit in edits:
        tokens.append(np.asarray(edit.tokens))
        if "at" in edit.along:  # a patch reads elsewhere than it writes
            places.append(np.asarray(edit.along["at"])[np.asarray(edit.tokens)])
    places += [np.nonzero(mask)[1] for mask in tokens]
    return int(np.concatenate(places).min()) // PREFIX * PREFIX
