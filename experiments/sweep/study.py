"""The steps of the sweep; see `experiments/sweep/__main__.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context, examples
from experiments.context import Context
from experiments.sweep import page
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import intervals
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits

GRIDS = ("tokens", "heads", "parts", "strengths")
Side = tuple[Any, Any]  # an example and its question
Pair = tuple[Side, Side]


def run(config: ml_collections.ConfigDict, workdir: store.Workdir) -> None:
    """Run the study.

    Args:
        config: its settings, see configs/embedded_sweep.py.
        workdir: the folder of its steps and results.
    """
    context.require_choice("config.grid", config.grid, GRIDS)
    model, processor = mj.load(config.model)
    study = Context(config=config, workdir=workdir, model=model, processor=processor)
    pairs = [
        pair
        for name, domain in examples.domains_of(config, "test").items()
        for pair in partners(processor, name, list(domain), config.style, config.pairs_per_domain)
    ]
    study.claim({"pairs": context.content(side for pair in pairs for side in pair)})
    columns = grid(config, model)
    effect = _measure(study, pairs, columns)
    interval = intervals.mean(np.moveaxis(effect, -1, 0))
    value, low, high = (np.asarray(part).T for part in interval)  # [L, columns]
    results = {
        "study": "sweep", "grid": config.grid, "columns": list(columns), "pairs": len(pairs),
        "effect": value.tolist(), "low": low.tolist(), "high": high.tolist(),
        "domains": sorted({example.domain for pair in pairs for example, _ in pair}),
    }  # fmt: skip
    study.finish(results, page.write)
    print(f"finished: {workdir.path / 'index.html'}")


def partners(processor, name: str, pictures: list, style: str, count: int) -> list[Pair]:
    """Return pairs of pictures with the same prompt, whose answers begin with different tokens.

    Args:
        processor: the processor of the model.
        name: the name of the domain.
        pictures: the examples of the domain.
        style: the style of the question.
        count: the largest number of pairs.

    Raises:
        ValueError: there is no pair.
    """
    pairs: list[Pair] = []
    remaining = list(batching.ask(pictures, (style,)))
    while remaining and len(pairs) < count:
        side = remaining.pop(0)
        for i, other in enumerate(remaining):
            same_prompt = side[1].prompt == other[1].prompt
            if same_prompt and _first_token(processor, side) != _first_token(processor, other):
                pairs.append((side, remaining.pop(i)))
                break
    if not pairs:
        raise ValueError(
            f"domain {name} has no two pictures with the same question of style {style} and "
            "different answers; name another config.style"
        )
    return pairs


def _first_token(processor, side: Side) -> int:
    """Return the first token of the right answer."""
    return processor.answer_ids(side[1].answer)[0]


def grid(config: ml_collections.ConfigDict, model) -> dict[str, list[Edits]]:
    """Return the edits of each column, by layer; the partners are the second half of a batch."""
    layers = range(model.config.lm.layers)
    if config.grid == "heads":
        heads = range(model.config.lm.heads)
        return {str(h): [mj.ablate(S.lm.attn.heads[i, [h]]) for i in layers] for h in heads}
    if config.grid == "parts":
        parts = {"attention": S.lm.attn_out, "MLP": S.lm.mlp.out}
        return {name: [mj.ablate(site[i]) for i in layers] for name, site in parts.items()}
    if config.grid == "strengths":
        return {f"x {a:g}": [mj.scale(S.lm.mlp.out[i], a) for i in layers]
                for a in config.strengths}  # fmt: skip
    side = model.config.vision.grid // model.config.projector.fold
    own, partner = np.arange(config.batch_size), np.arange(config.batch_size) + config.batch_size
    where = {f"picture row {r}": tok.row(r) for r in range(side)}
    where |= {"question": tok.question, "last token": tok.last}
    return {
        name: [mj.patch(S.lm.resid_post[i], partner, own, where=w) for i in layers]
        for name, w in where.items()
    }


def _measure(study: Context, pairs: list[Pair], columns: dict[str, list[Edits]]) -> np.ndarray:
    """Return float32[columns, L, pairs], the effects of all edits on all pairs."""
    size = study.config.batch_size
    length = batching.row_length(study.processor, [side for pair in pairs for side in pair])
    effects = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        step = study.workdir.arrays(
            f"pairs-{start}", functools.partial(_effects, study, some, columns, length)
        )
        effects.append(step["effect"])
    return np.concatenate(effects, -1)


def _effects(
    study: Context, pairs: list[Pair], columns: dict[str, list[Edits]], length: int
) -> dict[str, np.ndarray]:
    """Return `effect`, float32[columns, L, pairs]: the change of the log-odds by each edit."""
    model, processor = study.model, study.processor
    count, size = len(pairs), study.config.batch_size
    filled = pairs + pairs[:1] * (size - count)  # one shape for all batches
    rows = [own for own, _ in filled] + [partner for _, partner in filled]
    batch = processor(
        [example.image for example, _ in rows], [q.prompt for _, q in rows], length=length
    )
    words = np.array([_first_token(processor, side) for side in rows], np.int32).reshape(2, size)
    metric = jax.tree_util.Partial(log_odds, own=words[0], other=words[1])
    clean = np.asarray(metric(mj.run(model, batch)))
    effects: dict[str, np.ndarray] = {}
    for names in _by_site(columns):
        edits = [edit for name in names for edit in columns[name]]
        swept = mj.sweep(metric, model, batch, edits, label=names[0])
        effects |= dict(zip(names, swept.reshape(len(names), -1, size) - clean, strict=True))
    return {"effect": np.stack([effects[name] for name in columns])[..., :count]}


def log_odds(out, own, other) -> jax.Array:
    """Return float32[pairs], the log-odds of the own answer against the partner's."""
    logits = out.logits[: len(own)]
    rows = np.arange(len(own))
    return logits[rows, own] - logits[rows, other]


def _by_site(columns: dict[str, list[Edits]]) -> list[list[str]]:
    """Group the columns of the same site, which form one sweep."""
    groups: dict[str, list[str]] = {}
    for name, edits in columns.items():
        groups.setdefault(str(next(iter(edits[0])).address.site), []).append(name)
    return list(groups.values())
