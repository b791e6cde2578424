"""Checks of the arguments of passes, which raise an error of one line before any computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from mllm_jax.arguments import type_error
from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edit, Edits


def check(model: Any, batch: Any, edits: Any = None, captures: Any = None) -> None:
    """Check the arguments that all passes share.

    Args:
      model: The model.
      batch: The batch that it reads.
      edits: The edits to apply.
      captures: The captures to return, by name.

    Raises:
      ValueError: One of them has a wrong type.
    """
    check_model(model)
    if not isinstance(batch, Batch):
        raise type_error("batch", batch, "a batch from a processor: processor(images, texts)")
    _check_tiles(batch)
    _check_words(batch, model.config.lm.vocab)
    if edits is not None:
        check_edits(edits)
    if captures is not None:
        check_captures(captures)


def _check_tiles(batch: Batch) -> None:
    """Check that there are pixels or features of every tile: others would be read instead."""
    name = "pixels" if batch.features is None else "features"
    given, tiles = getattr(batch, name), len(batch.is_real_tile)
    if given is not None and len(given) != tiles:
        raise ValueError(f"the batch has {name} of {len(given)} tiles and places for {tiles}")


def _check_words(batch: Batch, words: int) -> None:
    """Check that the model knows the words of a batch, where the batch is known on the host."""
    arrays = batch.ids, batch.valid, batch.image_token_index
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return
    ids, valid, image = arrays
    wrong = ((ids < 0) | (ids >= words)) & valid & (image < 0)
    if wrong.any():
        row, at = np.argwhere(wrong)[0]
        raise ValueError(
            f"row {row} of the batch: token {at} has id {ids[row, at]}, and the model has words 0 "
            f"to {words - 1}: make the batch by the processor that mj.load returned with the model"
        )


def check_stream(captures: Any, model: Any, batches: Any, edits: Any) -> None:
    """Check the arguments of a pass over many batches; see `check`."""
    check_captures(captures)
    check_model(model)
    check_batches(batches)
    if edits is not None:
        check_edits(edits)


def check_model(model: Any) -> None:
    """Check that a model is one; see `check`."""
    if isinstance(model, type) or not hasattr(model, "token_maps"):
        raise type_error("model", model, "a model: model, processor = mj.load(name)")


def check_edits(edits: Any) -> None:
    """Check that edits are edits; see `check`."""
    if not isinstance(edits, Edits) or not all(isinstance(edit, Edit) for edit in edits):
        raise type_error(
            "edits", edits, "edits from mj.ablate, ...; compose them with first >> second"
        )


def check_captures(captures: Any) -> None:
    """Check that captures are captures by name; see `check`."""
    if not isinstance(captures, dict):
        raise type_error("captures", captures, 'captures by name: {"name": mj.keep(site)}')
    for name, capture in captures.items():
        if not isinstance(name, str):
            raise type_error(f"the name {name!r:.40} of a capture", name, "a string")
        if not isinstance(capture, Capture):
            raise type_error(
                f"capture '{name:.40}'", capture, "a capture from mj.keep, mj.stats, ..."
            )


def check_batches(batches: Any, *, by_number: bool = False) -> None:
    """Check that batches are an iterable of batches.

    Args:
      batches: The batches.
      by_number: Whether they are read by index, in any order.

    Raises:
      ValueError: They are a single batch, a string, or not an iterable of batches.
    """
    indexed = hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
    wrong = isinstance(batches, Batch | str | bytes | dict)
    if wrong or not (indexed or (isinstance(batches, Iterable) and not by_number)):
        raise type_error("batches", batches, "a list of batches: [batch]")


def as_partial(metric: Callable[..., Any]) -> jax.tree_util.Partial:
    """Return a function as a pytree, with its bound arrays as leaves."""
    return metric if isinstance(metric, jax.tree_util.Partial) else jax.tree_util.Partial(metric)
