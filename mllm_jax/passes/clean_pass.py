"""The clean pass of a sweep: the work that its lanes share, done once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mllm_jax import sites
from mllm_jax.batch import Batch
from mllm_jax.interventions import binding
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.captures import keep
from mllm_jax.interventions.edits import BoundEdit
from mllm_jax.interventions.forms import FORMS
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Resume, Taps
from mllm_jax.models.cache import Cache
from mllm_jax.passes.run import Logits
from mllm_jax.sharding import mesh
from mllm_jax.typing import AnyArray, Bool, Float, Int

BUDGET = 2**30  # bytes of the states that are kept
PREFIX = 16  # tokens: a shared prefix is a multiple of this, so that programs are few
_STATE = "what enters a layer"  # the name of an internal capture

Lane = tuple[BoundEdit, ...]
Captures = dict[str, BoundCapture]


@dataclasses.dataclass(frozen=True)
class CleanPass:
    """The results that all lanes share, computed once.

    Attributes:
      batch: The batch, with vision features if no edit changes them.
      first: The first layer of the module that each lane must run, int[R].
      stop: The first layer of the LM that each lane runs only for the last tokens, int[R], the
        number of layers if there is none; None if all tokens are needed.
      prefix: The number of tokens at the start that each lane leaves clean, int[R].
      module: The module whose lower layers are shared; None if there is none.
      layers: The number of layers of the module.
      every: The number of layers from one kept state to the next.
      states: The inputs of each of these layers, [layers / every, B, T, D].
      captured: The results of the captures in a pass without edits.
      past: The LM's cache of the longest prefix, or None.
    """

    batch: Batch
    first: Int[np.ndarray, " R"]
    stop: Int[np.ndarray, " R"] | None
    prefix: Int[np.ndarray, " R"]
    module: str | None = None
    layers: int = 1
    every: int = 1
    states: Float[AnyArray, "n B T D"] | None = None
    captured: Any = None
    past: Cache | None = None

    def resume(self, lanes: Int[np.ndarray, " n"]) -> tuple[dict[str, Resume], Cache | None]:
        """Return the resume points by module, and the cache, of lanes that share one prefix."""
        prefix, resume, past = int(self.prefix[lanes[0]]), {}, None
        if self.module is not None:
            assert self.states is not None, "a shared module has states"
            number = int(self.first[lanes].min()) // self.every
            x = self.states[number][:, prefix:]
            resume[self.module] = Resume(
                np.asarray(number * self.every, np.int32), x, self.captured
            )
            past = self.past.first(prefix) if prefix and self.past is not None else None
        if self.stop is not None:
            resume["lm"] = dataclasses.replace(
                resume.get("lm", Resume(np.asarray(0, np.int32), None, {})),
                stop=np.asarray(self.stop[lanes].max(), np.int32),
                places=np.asarray(self.batch.last, np.int32) - prefix,
            )
        return resume, past

    def chunks(self, size: int) -> list[Int[np.ndarray, " n"]]:
        """Return the lanes in chunks of one prefix that start at nearby layers."""
        chunks = []
        for prefix in np.unique(self.prefix):
            lanes = np.flatnonzero(self.prefix == prefix)
            lanes = lanes[np.argsort(self.first[lanes], kind="stable")]
            chunks += [lanes[i : i + size] for i in range(0, len(lanes), size)]
        return chunks

    def cost(self, size: int) -> int:
        """Return the layers x tokens of chunks of this size, with one more lane for each chunk."""
        T = self.batch.ids.shape[1]
        return sum(
            (size + 1) * int(self.layers - self.first[lanes].min()) * int(T - self.prefix[lanes[0]])
            for lanes in self.chunks(size)
        )


def without_sharing(
    model: Model, batch: Batch, lanes: Sequence[Lane], captures: Captures, logits: Logits
) -> CleanPass:
    """Return a clean pass that shares nothing: every lane runs all layers.

    The arguments are those of `compute_clean_pass`.
    """
    zeros = np.zeros(len(lanes), int)
    layers = site_shapes(model, batch)["lm.resid_pre"].layers
    return CleanPass(batch, zeros, stop_layers(lanes, captures, logits, layers), zeros)


def compute_clean_pass(
    model: Model, batch: Batch, lanes: Sequence[Lane], captures: Captures, logits: Logits
) -> CleanPass:
    """Compute the clean pass, as far as the lanes share it.

    Args:
      model: See `run`.
      batch: See `run`.
      lanes: The edits of each lane.
      captures: The captures, which all lanes share.
      logits: See `run`.
    """
    shapes = site_shapes(model, batch)
    edited = {edit.site for lane in lanes for edit in lane}
    modules = {site.module for site in edited} - {"logits"}
    reads_vision = any(c.site.module == "vision" for c in captures.values())
    if "vision" in modules:
        # DeepStack uses the outputs of layers below the one at which a lane would resume.
        resumes = sites.vision.embed not in edited and "projector.deepstack" not in shapes
        module = "vision" if resumes else None
    else:
        module = "lm" if modules <= {"lm"} and sites.lm.embed not in edited else None
        if batch.features is None and not reads_vision and len(batch.is_real_tile):
            batch = batch.replace(features=_features(model, batch))
    from_first = any(FORMS[capture.form].carry is not None for capture in captures.values())
    if module is None or from_first or f"{module}.resid_pre" not in shapes:
        return without_sharing(model, batch, lanes, captures, logits)
    site = sites.get(f"{module}.resid_pre")
    layers = shapes[site.name].layers
    first = np.array([_first_edited_layer(lane, module, layers) for lane in lanes])
    prefix = np.zeros_like(first)
    if module == "lm":
        prefix = np.array([prefix_length(batch, lane, captures, logits) for lane in lanes])
    size = int(np.prod(shapes[site.name].shape)) * np.dtype(shapes[site.name].dtype).itemsize
    every = max(1, -(-layers * size // BUDGET))
    state = binding.bind(model, batch, None, {_STATE: keep(site[0:layers:every])})[1][_STATE]
    # Padding is carried along as well.
    state = dataclasses.replace(state, tokens=np.ones_like(state.tokens))
    # No lane uses the latents of a lower layer from here; their captures still need a shape.
    splices = tuple(edit for edit in lanes[0] if edit.splice is not None)
    states, captured, past = _clean(
        model, batch, captures | {_STATE: state}, splices, module=module, prefix=int(prefix.max())
    )
    stop = stop_layers(lanes, captures, logits, shapes["lm.resid_pre"].layers)
    if module == "lm" and stop is not None:
        stop = np.where(first < layers - 1, stop, layers)  # a lane starts below where it stops
    return CleanPass(batch, first, stop, prefix, module, layers, every, states, captured, past)


@functools.partial(jax.jit, static_argnames=("module", "prefix"))
def _clean(
    model: Model, batch: Batch, captures: Captures, splices: Lane, *, module: str, prefix: int
):
    inside = {n: c for n, c in captures.items() if c.site.module == module and c.site.stacked}
    if not any(capture.site.is_latents for capture in inside.values()):
        splices = ()

    def clean(_, model, batch, inside, splices):
        taps = Taps(splices, inside)
        past = None
        if module == "vision":
            model.features(batch, taps)
        else:
            _, cache = model(batch, taps)
            past = cache.first(prefix) if prefix else None
        return taps.captured.pop(_STATE), taps.captured, past

    return mesh.map_lanes(clean, None, model, batch, inside, splices)


@jax.jit
def _features(model: Model, batch: Batch):
    return mesh.map_lanes(lambda _, model, batch: model.features(batch, Taps()), None, model, batch)


def _first_edited_layer(lane: Lane, module: str, layers: int) -> int:
    """Return the first layer of the module that an edit of this lane changes."""
    edited = [np.flatnonzero(layers) for layers in _edited_layers(lane, module)]
    # The state above the last layer is not kept, so at least that layer runs again.
    return int(min((at[0] for at in edited), default=layers - 1))


def _edited_layers(lane: Lane, module: str) -> list[Bool[np.ndarray, " L"]]:
    """Return the layers that each edit of a module changes; a splice represents its latents."""
    edits = [edit for edit in lane if edit.site.module == module and edit.site.stacked]
    units = [np.asarray(edit.units) for edit in edits if not edit.site.is_latents]
    return [np.any(mask, axis=-1) for mask in units]


def stop_layers(
    lanes: Sequence[Lane], captures: Captures, logits: Logits, layers: int
) -> Int[np.ndarray, " R"] | None:
    """Return the layers from which lanes run only the last tokens, see `CleanPass.stop`."""
    reads_states = any(capture.site.module == "lm" for capture in captures.values())
    edits_norm = any(edit.site == sites.lm.norm for lane in lanes for edit in lane)
    if logits != "last" or reads_states or edits_norm:
        return None

    def last_is_clean(lane: Lane) -> bool:
        return not any(edited[-1] for edited in _edited_layers(lane, "lm"))

    return np.array([layers - last_is_clean(lane) for lane in lanes])


def prefix_length(batch: Batch, lane: Lane, captures: Captures, logits: Logits) -> int:
    """Return the number of tokens at the start that no edit changes and no capture reads."""
    keeps_tokens = any(FORMS[c.form].by == "token" for c in captures.values())
    outside = any(c.site.module not in ("lm", "logits") for c in captures.values())
    if logits == "all" or keeps_tokens or outside or batch.segment is not None:
        return 0
    masks = [np.asarray(c.tokens) for c in captures.values()]
    places = [np.asarray(batch.last)]
    for edit in lane:
        if edit.is_transparent:
            continue
        masks.append(np.asarray(edit.tokens))
        if "at" in edit.along:  # a patch reads elsewhere than it writes
            places.append(np.asarray(edit.along["at"])[np.asarray(edit.tokens)])
    places += [np.nonzero(mask)[1] for mask in masks]
    length = int(np.concatenate(places).min()) // PREFIX * PREFIX
    while length and not _is_closed(batch.block, length):
        length -= PREFIX
    return length


def _is_closed(block: Int[AnyArray, "B T"] | None, length: int) -> bool:
    """Return whether the first tokens attend to none of the later ones."""
    if block is None:
        return True
    block = np.asarray(block)
    before, after = block[:, :length], block[:, length:]
    same = (before[:, :, None] == after[:, None, :]) & (before > 0)[:, :, None]
    return not same.any()
