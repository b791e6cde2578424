"""Build the program of each study with shapes in place of arrays, for a plan to compile.

The functions are those that the studies run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mllm_jax import sites, tokens
from mllm_jax.batch import Batch, Interpolation
from mllm_jax.interventions import binding
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Resume, Taps
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.passes import clean_pass, generate, run, score, sweep
from mllm_jax.training import losses, parts

_STEPS = 100  # of a training; the program does not depend on the number
TOKEN_MULTIPLE = 128  # T is a multiple of this, the size of a tile of a TPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of the inputs of a program.

    Attributes:
      rows: The number of rows B over all data shards.
      words: The smallest number of tokens in a row besides the image.
      lanes: The edits that a sweep runs at a time, over all data shards.
      steps: The number of tokens to generate.
      answer: The number of tokens of an answer to score or to train on.
      candidates: The number of candidates C.
      remat: Whether training recomputes layers in the backward pass.
    """

    rows: int = 8
    words: int = 64
    lanes: int = 4
    steps: int = 32
    answer: int = 16
    candidates: int = 4
    remat: bool = True


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, and its arguments.

    Attributes:
      fn: The function; jitted, unless it returns some of its arguments updated.
      args: Pytrees of shapes with their roles (weights, frozen, optimiser, batch, edits,
        captures, or "" for others), in the order of the call.
      static: Its static arguments.
      kept: Further pytrees that are in memory meanwhile.
      unknown: The number of trips of loops whose length is data.
      back: The number of leading arguments that are returned updated, with the same sharding.
    """

    fn: Callable
    args: tuple[tuple[str, Any], ...]
    static: dict[str, Any]
    kept: tuple[tuple[str, Any], ...] = ()
    unknown: int = 1
    back: int = 0


def abstract_model(config: MultimodalConfig, dtype: DTypeLike) -> MultimodalModel:
    """Return the network with shapes in place of weights."""
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract)


def abstract_batch(config: MultimodalConfig, size: Size, multiple: int = TOKEN_MULTIPLE) -> Batch:
    """Return a batch of rows with one image of the largest size, a system token and a question.

    The arrays by which edits and captures select tokens have values; pixels and ids are shapes.

    Args:
      config: The config of the model.
      size: The sizes of the batch.
      multiple: The number of which T is a multiple.
    """
    layout = config.layout(config.largest)
    patches, tiles, B = layout.patches, config.tiles, size.rows
    T = -(-(len(patches) + size.words) // multiple) * multiple
    kind = np.full(T, tokens.CODE["question"], np.int8)
    kind[0] = tokens.CODE["system"]
    image = slice(1, 1 + len(patches))
    kind[image] = np.where(patches < 0, tokens.CODE["newline"], tokens.CODE["image"])
    image_token_index = np.full((B, T), -1, np.int32)
    first = np.arange(B)[:, None] * tiles * config.image_tokens
    image_token_index[:, image] = np.where(
        patches < 0, B * tiles * config.image_tokens, first + patches
    )

    def broadcast(value, dtype) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), (B, T))

    tile = np.tile(np.arange(tiles), B).astype(np.int16)
    uses_axes = config.lm.rope_sections is not None
    forward = {"none": None, "picture": kind == tokens.CODE["image"], "prompt": kind > 0}
    block = forward[config.attends_forward]
    return Batch(
        ids=_shape(np.int32, B, T),
        position=broadcast(np.arange(T), np.int32),
        tokens=tokens.TokenMap(
            kind=broadcast(kind, np.int8), row=broadcast(-1, np.int16),
            column=broadcast(-1, np.int16),
            tile=broadcast(-1, np.int16), last=broadcast(np.arange(T) == T - 1, bool),
        ),
        image_token_index=image_token_index,
        pixels=_shape(np.float32, B * tiles, *config.pixel_shape),
        tile=tile,
        is_real_tile=tile < layout.tiles,
        rotary_position=np.broadcast_to(np.arange(T, dtype=np.int32), (3, B, T)) if uses_axes
        else None,
        block=None if block is None else broadcast(block, np.int32),
        grid=None
        if layout.grid is None
        else np.tile(np.asarray(layout.grid, np.int32), (B * tiles, 1)),
        interpolation=None
        if layout.interpolation is None
        else Interpolation(_shape(np.int32, B, T, 4), _shape(np.float32, B, T, 4)),
        qformer_ids=_shape(np.int32, B * tiles, size.words),
        qformer_kind=np.full((B * tiles, size.words), tokens.CODE["question"], np.int8),
    )  # fmt: skip


def study_captures(study: str) -> dict[str, captures_.Capture]:
    """Return the captures of a study."""
    known = {
        "counts": lambda: captures_.stats(sites.lm.mlp.act, by=tokens.kind),
        "lens": lambda: captures_.lens(sites.lm.resid_post, by=tokens.kind),
    }
    return {name: known[name]() for name in study.split("+") if name in known}


def build(study: str, model, batch, edits, captures, size: Size) -> Program:
    """Build the program of a study.

    Args:
      study: A member of STUDIES, or captures joined by "+".
      model: The network, as shapes.
      batch: The batch.
      edits: The edits of each pass; for a sweep those of its first lane.
      captures: The captures of each pass, besides those of the study.
      size: The sizes of the inputs.

    Raises:
      ValueError: The study is unknown.
    """
    if study not in STUDIES and not study_captures(study):
        raise ValueError(f"study {study!r} is not one of {', '.join(STUDIES)}, counts+lens")
    make = STUDIES.get(study, _reduce)
    return make(model, batch, edits, study_captures(study) | (captures or {}), size)


def _run(model, batch, edits, captures, size: Size, logits: str = "last") -> Program:
    bound, found = binding.bind(model, batch, edits, captures)
    args = ("weights", model), ("batch", batch), ("edits", bound), ("captures", found)
    return Program(run.compiled_run, args, {"logits": logits, "remat": False})


def _reduce(model, batch, edits, captures, size: Size) -> Program:
    return _run(model, batch, edits, captures, size, "none")


def _sweep(model, batch, edits, captures, size: Size) -> Program:
    """Build lanes that start at the first layer and share the image: the most expensive case."""
    edits = edits or edits_.ablate(sites.lm.mlp.act[0, :1])
    shapes = site_shapes(model, batch)
    bound, found = binding.bind(model, batch, edits, captures)
    splices, (rest,) = sweep.separate_splices([bound])
    lanes = jax.tree.map(lambda a: _shape(a.dtype, size.lanes, *np.shape(a)), rest)
    x = shapes[sites.lm.resid_pre.name]
    layers = model.config.lm.layers
    state = jnp.dtype(x.dtype).itemsize * int(np.prod(x.shape))
    every = max(1, -(-layers * state // clean_pass.BUDGET))
    kept = _shape(x.dtype, -(-layers // every), *x.shape)
    seen = batch.replace(features=_features(model, batch))
    captured = jax.eval_shape(
        lambda m, b, e, c: run.compiled_run(m, b, e, c, logits="none", remat=False).captures,
        model, batch, tuple(splices.values()), found,
    )  # fmt: skip
    stops = clean_pass.stop_layers([bound], found, "last", layers)
    resume = Resume(_shape(np.int32), _shape(x.dtype, *x.shape), captured)
    if stops is not None:  # the last layer computes only the last token
        places = _shape(np.int32, size.rows)
        resume = dataclasses.replace(resume, stop=_shape(np.int32), places=places)
    metric = jax.tree_util.Partial(_metric)
    args = (
        ("", metric), ("weights", model), ("batch", seen), ("edits", splices), ("edits", lanes),
        ("captures", found), ("states", {"lm": resume}), ("", None),
    )  # fmt: skip
    static = {"logits": "last", "prefix": 0}
    loop = (
        layers if stops is None else int(stops[0])
    ) - 1  # the first layer is outside of the loop
    return Program(sweep.compiled_lanes, args, static, (("states", kept),), unknown=loop)


def _metric(out: run.Out) -> jax.Array:
    assert out.logits is not None
    return out.logits[:, :2]


def _generate(model, batch, edits, captures, size: Size) -> Program:
    bound = binding.bind_continuation(model, batch, edits, size.steps)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (
        ("weights", model), ("batch", batch), ("edits", bound), ("", _shape(np.int32, 1)),
        ("", _shape(np.float32)), ("", key),
    )  # fmt: skip
    static = {"steps": size.steps, "greedy": True}
    return Program(generate.compiled_generate, args, static, unknown=size.steps - 1)


def _score(model, batch, edits, captures, size: Size) -> Program:
    bound = binding.bind_continuation(model, batch, edits, size.answer)
    found = binding.bind(model, batch, binding.splices(edits), captures)[1]
    ids = _shape(np.int32, size.rows, size.candidates, size.answer)
    args = (
        ("weights", model), ("batch", batch), ("edits", bound), ("captures", found), ("batch", ids),
    )  # fmt: skip
    return Program(score.compiled_score, args, {})


def _train(part: str) -> Callable:
    def make(model, batch, edits, captures, size: Size) -> Program:
        from mllm_jax.training import fit

        if edits or captures:
            raise ValueError("training takes no edits and no captures")
        labels = _shape(np.int32, size.rows, size.answer)
        seen = batch.replace(features=_features(model, batch), labels=labels)
        recipe = fit.Recipe(part=part, remat=size.remat)
        merge, trained, frozen = parts.partition(model, part)
        state = jax.eval_shape(recipe.optimiser(_STEPS).init, trained)
        args = (
            ("weights", trained), ("optimiser", state), ("frozen", frozen), ("batch", [seen]),
        )  # fmt: skip
        step = functools.partial(
            fit.update, merge=merge, recipe=recipe, steps=_STEPS, loss=losses.answer_nll, places=()
        )
        return Program(step, args, {}, back=2)

    return make


STUDIES: dict[str, Callable] = {
    "run": _run,
    "counts": _reduce,
    "lens": _reduce,
    "sweep": _sweep,
    "generate": _generate,
    "score": _score,
    "projection": _train("projector"),
    "e2e": _train("projector+lm"),
}


def _features(model: MultimodalModel, batch: Batch) -> jax.Array:
    """Return the vision features, which sweeps and training compute first."""
    return jax.eval_shape(lambda model, batch: model.features(batch, Taps()), model, batch)


def _shape(dtype: DTypeLike, *shape: int) -> jax.Array:
    """Return a shape that stands in place of an array."""
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))
