"""The program of each study, with shapes in the place of arrays: what a plan compiles.

They are the very functions that the studies run, found where the studies find them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import sites, tokens
from mllm_jax.batch import Batch
from mllm_jax.interventions import binding
from mllm_jax.interventions import captures as captures_
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Resume, Taps
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.passes import clean_pass, generate, run, score, sweep
from mllm_jax.training import losses, parts

_STEPS = 100  # of a training: it does not matter how many
TOKEN_MULTIPLE = 128  # T is a multiple of this: a TPU works on tiles of so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much one program works on.

    Attributes:
      rows: B, over all data shards. words: in each row beside the picture, at least.
      lanes: edits at one time in a sweep, over all data shards.
      steps: tokens to be generated. answer: of an answer to score or to train on.
      candidates: C. remat: of training.
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
    """A compiled function to be, and what it is given.

    Attributes:
      fn: jitted, unless it gives some of its arguments back. static: its static arguments.
      args: trees of shapes by what they are: weights, frozen, optimiser, batch, edits, captures,
        and "" for the rest, in the order of the call.
      kept: further trees that lie in memory meanwhile.
      unknown: trips of its loops whose length is data.
      back: how many of its first arguments come back, to lie where they lay.
    """

    fn: Callable
    args: tuple[tuple[str, Any], ...]
    static: dict[str, Any]
    kept: tuple[tuple[str, Any], ...] = ()
    unknown: int = 1
    back: int = 0


def abstract_model(config: MultimodalConfig, dtype) -> nnx.Module:
    """The network without weights."""
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract)


def abstract_batch(config: MultimodalConfig, size: Size) -> Batch:
    """Rows of one picture, as large as one can be, between a system word and a question.

    What edits and captures select by is there; pixels and words are shapes.
    """
    layout = config.layout(config.largest)
    patches, tiles, B = layout.patches, config.tiles, size.rows
    T = -(-(len(patches) + size.words) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    kind = np.full(T, tokens.CODE["question"], np.int8)
    kind[0] = tokens.CODE["system"]
    here = slice(1, 1 + len(patches))
    kind[here] = np.where(patches < 0, tokens.CODE["newline"], tokens.CODE["image"])
    image_token_index = np.full((B, T), -1, np.int32)
    first = np.arange(B)[:, None] * tiles * config.image_tokens
    image_token_index[:, here] = np.where(
        patches < 0, B * tiles * config.image_tokens, first + patches
    )

    def each(value, dtype) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), (B, T))

    tile, side = np.tile(np.arange(tiles), B).astype(np.int16), config.vision.image_size
    return Batch(
        ids=_shape(np.int32, B, T),
        position=each(np.arange(T), np.int32),
        tokens=tokens.TokenMap(
            kind=each(kind, np.int8), row=each(-1, np.int16), column=each(-1, np.int16),
            tile=each(-1, np.int16), last=each(np.arange(T) == T - 1, bool),
        ),
        image_token_index=image_token_index,
        pixels=_shape(np.float32, B * tiles, side, side, 3),
        tile=tile,
        is_real_tile=tile < layout.tiles,
        qformer_ids=_shape(np.int32, B * tiles, size.words),
        qformer_kind=np.full((B * tiles, size.words), tokens.CODE["question"], np.int8),
    )  # fmt: skip


def study_captures(study: str) -> dict[str, captures_.Capture]:
    """What a study brings back of each pass."""
    known = {
        "counts": lambda: captures_.stats(sites.lm.mlp.act, by=tokens.kind),
        "lens": lambda: captures_.lens(sites.lm.resid_post, by=tokens.kind),
    }
    return {name: known[name]() for name in study.split("+") if name in known}


def build(study: str, model, batch, edits, captures, size: Size) -> Program:
    """The program of a study.

    Args:
      size: the sizes of the study.
      model: the network, with shapes for arrays.
      captures: further captures of each pass.
      batch: what it reads.
      study: a name of STUDIES, or several captures joined by "+".
      edits: of each pass; of a sweep those of its first lane.

    Raises:
      ValueError: there is no such study.
    """
    if study not in STUDIES and not study_captures(study):
        raise ValueError(f"study {study!r} is none of {', '.join(STUDIES)}, counts+lens")
    make = STUDIES.get(study, _reduce)
    return make(model, batch, edits, study_captures(study) | (captures or {}), size)


def _run(model, batch, edits, captures, size: Size, logits: str = "last") -> Program:
    bound, found = binding.bind(model, batch, edits, captures)
    args = ("weights", model), ("batch", batch), ("edits", bound), ("captures", found)
    return Program(run.compiled_run, args, {"logits": logits, "remat": False})


def _reduce(model, batch, edits, captures, size: Size) -> Program:
    return _run(model, batch, edits, captures, size, "none")


def _sweep(model, batch, edits, captures, size: Size) -> Program:
    """Lanes that start at the first layer and share the picture: the most that they can cost."""
    edits = edits or edits_.ablate(sites.lm.mlp.act[0, :1])
    shapes = site_shapes(model, batch)
    bound, found = binding.bind(model, batch, edits, captures)
    lanes = jax.tree.map(lambda a: _shape(a.dtype, size.lanes, *np.shape(a)), bound)
    x = shapes[sites.lm.resid_pre.name]
    layers = model.config.lm.layers
    state = jnp.dtype(x.dtype).itemsize * int(np.prod(x.shape))
    every = max(1, -(-layers * state // clean_pass.BUDGET))
    kept = _shape(x.dtype, -(-layers // every), *x.shape)
    seen = batch.replace(features=_features(model, batch))
    captured = jax.eval_shape(
        lambda m, b, c: run.compiled_run(m, b, (), c, logits="none", remat=False).captures,
        model, batch, found,
    )  # fmt: skip
    stops = clean_pass.stop_layers([bound], found, "last", layers)
    resume = Resume(_shape(np.int32), _shape(x.dtype, *x.shape), captured)
    if stops is not None:  # of the last layer all tokens but the last one are left out
        places = _shape(np.int32, size.rows)
        resume = dataclasses.replace(resume, stop=_shape(np.int32), places=places)
    metric = jax.tree_util.Partial(_metric)
    args = (
        ("", metric), ("weights", model), ("batch", seen), ("edits", lanes), ("captures", found),
        ("states", {"lm": resume}), ("", None),
    )  # fmt: skip
    static = {"logits": "last", "prefix": 0}
    loop = (layers if stops is None else int(stops[0])) - 1  # the first layer is outside of it
    return Program(sweep.compiled_lanes, args, static, (("states", kept),), unknown=loop)


def _metric(out: run.Out) -> jax.Array:
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
    found = binding.bind(model, batch, None, captures)[1]
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


def _features(model, batch) -> jax.ShapeDtypeStruct:
    """The vision features, which sweeps and training read before they begin."""
    return jax.eval_shape(lambda model, batch: model.features(batch, Taps()), model, batch)


def _shape(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
