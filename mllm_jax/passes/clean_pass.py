"""The trunk of a sweep: one clean pass, and how far the lanes share it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mllm_jax import sites
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions.edits import BoundEdit
from mllm_jax.interventions.tap import Resume, Taps
from mllm_jax.models.cache import Cache
from mllm_jax.passes import run as run_
from mllm_jax.sharding import mesh

BUDGET = 2**30  # bytes of the states that are kept
PREFIX = 16  # tokens: a shared prefix is a multiple of this, so that programs are few
_STATE = "what enters a layer"


@dataclasses.dataclass(frozen=True)
class CleanPass:
    """What all lanes have in common, computed once.

    Attributes:
      batch: with the vision features, where no edit changes them.
      first: int[R], the first layer of the module that each lane must run.
      stop: int[R], the first layer of the LM that each lane runs for the last tokens alone, or as
        many as it has; None where all tokens are asked.
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
    stop: np.ndarray | None
    prefix: np.ndarray
    module: str | None = None
    layers: int = 1
    every: int = 1
    states: Any = None
    captured: Any = None
    past: Any = None

    def resume(self, lanes: np.ndarray) -> tuple[dict[str, Resume], Cache | None]:
        """Where lanes go on that have one prefix in common, and what they look back at."""
        prefix, found, past = int(self.prefix[lanes[0]]), {}, None
        if self.module is not None:
            number = int(self.first[lanes].min()) // self.every
            x = self.states[number][:, prefix:]
            found[self.module] = Resume(np.int32(number * self.every), x, self.captured)
            past = self.past.first(prefix) if prefix else None
        if self.stop is not None:
            found["lm"] = dataclasses.replace(
                found.get("lm", Resume(np.int32(0), None, {})),
                stop=np.int32(self.stop[lanes].max()),
                places=np.asarray(self.batch.last, np.int32) - prefix,
            )
        return found, past

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


def without_sharing(model, batch, bound, asked, logits: str) -> CleanPass:
    """A trunk of nothing: every lane runs all layers; see `grow`."""
    nothing = np.zeros(len(bound), int)
    layers = run_.site_shapes(model, batch)["lm.resid_pre"].layers
    return CleanPass(batch, nothing, stops(bound, asked, logits, layers), nothing)


def compute_clean_pass(model, batch, bound, asked, logits: str) -> CleanPass:
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
        if batch.features is None and not reads_vision and len(batch.is_real_tile):
            batch = batch.replace(features=_features(model, batch))
    if module is None or f"{module}.resid_pre" not in shapes:
        return without_sharing(model, batch, bound, asked, logits)
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
    stop = stops(bound, asked, logits, shapes["lm.resid_pre"].layers)
    if module == "lm" and stop is not None:
        stop = np.where(first < layers - 1, stop, layers)  # a lane begins below where it ends
    return CleanPass(batch, first, stop, prefix, module, layers, every, states, captured, past)


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

    return mesh.map_lanes(clean, None, model, batch, inside)


@jax.jit
def _features(model, batch):
    return mesh.map_lanes(lambda _, model, batch: model.features(batch, Taps()), None, model, batch)


def _first(edits: tuple[BoundEdit, ...], module: str, layers: int) -> int:
    """The first layer of the module that an edit of this lane reaches."""
    stacked = [e.units for e in edits if e.site.module == module and e.site.stacked]
    reached = [np.flatnonzero(np.asarray(units).any(-1)) for units in stacked]
    # Above the last layer the state is not kept: run that layer again.
    return int(min((at[0] for at in reached), default=layers - 1))


def stops(bound, asked, logits: str, layers: int) -> np.ndarray | None:
    """int[R], see `Trunk.stop`."""
    states = any(capture.site.module == "lm" for capture in asked.values())
    normed = any(edit.site == sites.lm.norm for edits in bound for edit in edits)
    if logits != "last" or states or normed:
        return None

    def clean(edits):
        above = [e.units for e in edits if e.site.module == "lm" and e.site.stacked]
        return not any(np.asarray(units)[-1].any() for units in above)

    return np.array([layers - clean(edits) for edits in bound])


def prefix_length(batch, edits: tuple[BoundEdit, ...], asked, logits: str) -> int:
    """How many tokens at the start no edit changes and no capture reads."""
    whole = any(captures_.FORMS[c.form].by == "token" for c in asked.values())
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
