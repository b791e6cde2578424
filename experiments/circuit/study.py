"""The steps of the circuit study; see `experiments/circuit/__main__.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context, examples
from experiments.circuit import graph, measures, page, pairs
from experiments.circuit.context import Arrays, Study
from experiments.circuit.pairs import Pair
from mllm_jax import store
from mllm_jax.analysis import attribution, circuits, edges, patching
from mllm_jax.analysis.edges import EdgeEffects
from mllm_jax.analysis.patching import Effects
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits
from mllm_jax.typing import Bool

KEEP = ("answered", "apart")
LEAST = 1e-3  # nats: a smaller difference of clean and corrupt metric is rounding


def run(
    config: ml_collections.ConfigDict, workdir: store.Workdir, edits: Edits | None = None
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_circuit.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
    """
    _check(config)
    edges.check_edits(edits or Edits())
    model, processor = mj.load(config.model)
    base = context.Context(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits()
    )
    nodes = len(config.kinds) * model.config.lm.layers * (model.config.lm.heads + 1)
    if (most := max(*config.sizes, config.circuit)) > nodes:
        raise ValueError(
            f"config.sizes={tuple(config.sizes)}, config.circuit={config.circuit}: {most} is more "
            f"than the {nodes} nodes of this model at tokens of {len(config.kinds)} kinds"
        )
    candidates = {
        split: _pairs(base, examples.examples_of(config, split, count))
        for split, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    }
    base.claim({
        split: context.content(side for pair in found for side in (pair.clean, pair.corrupt))
        for split, found in candidates.items()
    })  # fmt: skip
    every = [pair for found in candidates.values() for pair in found]
    length = batching.row_length(processor, [side for pair in every for side in pair[:2]])
    shared = max(len(pair.answers.shared) for pair in every)
    study = Study(**vars(base), pairs=candidates, length=length, shared=shared)
    ends = {split: _ends(study, split) for split in candidates}
    study = dataclasses.replace(
        study, pairs={split: _kept(study, split, *ends[split]) for split in candidates}
    )
    scores, effects, partly = _found(study)
    circuit = attribution.top_mask(scores, config.circuit)
    arrays = {"scores": scores, "circuit": circuit, "edges": effects.values[0]}
    store.atomic_npz(workdir / "circuit.npz", arrays)
    results = {
        "study": "circuit",
        "model": config.model,
        **{name: config[name] for name in ("swap", "partner", "keep", "steps")},
        "styles": list(config.styles),
        "kinds": list(config.kinds),
        "layers": model.config.lm.layers,
        "heads": model.config.lm.heads,
        "pairs": {
            split: {"candidates": len(candidates[split]), "kept": len(study.pairs[split])}
            for split in candidates
        },
        "nodes": measures.node_rows(study, circuit, scores),
        "edges": [graph.edge_row(*edge) for edge in effects.top(config.edges)],
        "graph": graph.within(effects, np.any(circuit, 0), config.edges, model.config.lm.kv_heads),
        "exact": measures.exact(study, scores, partly),
        **measures.held_out(study, scores, circuit),
    }
    study.finish(results, page.write, seed=config.seed)
    print(f"finished: {workdir / 'index.html'}")


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuse a config before anything is read."""
    context.require_choice("config.swap", config.swap, pairs.SWAPS)
    context.require_choice("config.partner", config.partner, pairs.PARTNERS)
    context.require_choice("config.keep", config.keep, KEEP)
    if config.steps < 0:
        raise ValueError(f"config.steps={config.steps} must be 0 (clean gradients only) or more")
    if not config.sizes or min(config.sizes) < 1 or config.circuit < 1:
        raise ValueError(
            f"config.sizes={tuple(config.sizes)}, config.circuit={config.circuit}: numbers of "
            "nodes must be 1 or more"
        )


def _pairs(base: context.Context, pictures: list[Any]) -> list[Pair]:
    """Return the pairs of some pictures that the config requests."""
    if base.config.swap == "question":
        return pairs.swap_questions(base.processor, pictures, base.config.styles)
    sides = batching.ask(pictures, base.config.styles)
    return pairs.swap_pictures(base.processor, sides, base.config.partner)


def _ends(study: Study, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric of all candidate pairs of a split, clean and corrupt."""

    def make(number: int) -> Arrays:
        contrast = study.contrast(split, number)
        sides = {"clean": contrast.clean, "corrupt": contrast.corrupt}
        real = study.real(split, number)
        return {name: contrast.metric_of(batch)[real] for name, batch in sides.items()}

    found = study.each("pairs", split, make)
    clean, corrupt = (np.concatenate([arrays[n] for arrays in found]) for n in ("clean", "corrupt"))
    return clean, corrupt


def _kept(study: Study, split: str, clean: np.ndarray, corrupt: np.ndarray) -> list[Pair]:
    """Return the pairs of a split that the model distinguishes."""
    apart = clean - corrupt > LEAST
    keep = apart & (clean > 0) & (corrupt < 0) if study.config.keep == "answered" else apart
    if not keep.any():
        wanted = {
            "answered": "the model prefers each input's own answer in",
            "apart": "the metric is higher for the clean input in",
        }
        raise ValueError(
            f"config.keep={study.config.keep}: {wanted[study.config.keep]} none of the {len(keep)} "
            f"{split} pairs, so there is no difference to explain; give more pictures"
        )
    return [pair for pair, kept in zip(study.pairs[split], keep, strict=True) if kept]


def _found(study: Study) -> tuple[np.ndarray, EdgeEffects, np.ndarray]:
    """Find nodes and edges on the training pairs.

    Returns:
      The scores of nodes, [kinds, L, nodes], and the effects of edges, as one row, both means over
      pairs; and the scores of nodes over only the first `exact_pairs`.
    """
    config, kinds = study.config, tuple(study.config.kinds)

    def of_nodes(number: int) -> Arrays:
        contrast, real = study.contrast("train", number), study.real("train", number)
        found = patching.attribute(contrast, circuits.NODE_SITES, steps=config.steps)
        scores = circuits.node_scores(_only(found, real), contrast, kinds=kinds)
        return {"scores": scores * len(real)}  # a sum over pairs

    def of_edges(number: int) -> Arrays:
        found = edges.attribute(study.contrast("train", number), steps=config.steps)
        return {"values": found.values[study.real("train", number)].sum(0)}

    count = len(study.pairs["train"])
    nodes = [arrays["scores"] for arrays in study.each("nodes", "train", of_nodes)]
    values = sum(
        arrays["values"].astype(np.float64) for arrays in study.each("edges", "train", of_edges)
    )
    used = study.batches("train", config.exact_pairs)
    partly = sum(nodes[: len(used)]) / min(count, len(used) * config.batch_size)
    effects = EdgeEffects.of((np.asarray(values) / count)[None], study.model.config.lm)
    return np.asarray(sum(nodes) / count), effects, np.asarray(partly)


def _only(effects: Effects, real: Bool[np.ndarray, " B"]) -> Effects:
    """Return effects that are 0 in rows that pad a batch."""

    def mask(value: np.ndarray) -> np.ndarray:  # [L, B, T, ...]
        return value * real.reshape(1, -1, *[1] * (value.ndim - 2))

    return dataclasses.replace(effects, values={k: mask(v) for k, v in effects.values.items()})
