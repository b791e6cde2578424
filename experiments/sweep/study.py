"""The steps of the sweep; see `experiments/sweep/__main__.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context, examples
from experiments.context import Context
from experiments.examples import Side
from experiments.sweep import page
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import intervals
from mllm_jax.batch import Layout
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits

GRIDS = ("tokens", "heads", "parts", "strengths")
Pair = tuple[Side, Side]


def run(config: ml_collections.ConfigDict, workdir: store.Workdir) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_sweep.py.
      workdir: The folder of its steps and results.
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
    effect, columns = _measure(study, pairs)
    interval = intervals.mean(np.moveaxis(effect, -1, 0))
    value, low, high = (np.asarray(part).T for part in interval)  # [L, columns]
    results = {
        "study": "sweep", "grid": config.grid, "columns": columns, "pairs": len(pairs),
        "effect": value.tolist(), "low": low.tolist(), "high": high.tolist(),
        "domains": sorted({example.domain for pair in pairs for example, _ in pair}),
    }  # fmt: skip
    study.finish(results, page.write)
    print(f"finished: {workdir.path / 'index.html'}")


def partners(processor, name: str, pictures: list, style: str, count: int) -> list[Pair]:
    """Return pairs of pictures with the same prompt, whose answers begin with different tokens.

    Args:
      processor: The processor of the model.
      name: The name of the domain.
      pictures: The examples of the domain.
      style: The style of the question.
      count: The largest number of pairs.

    Raises:
      ValueError: There is no pair.
    """

    def fits(side: Side, other: Side) -> bool:
        same_prompt = side[1].prompt == other[1].prompt
        return same_prompt and _first_token(processor, side) != _first_token(processor, other)

    pairs = examples.pair_up(batching.ask(pictures, (style,)), fits, count)
    if not pairs:
        raise ValueError(
            f"domain {name} has no two pictures with the same question of style {style} and "
            "different answers; set another config.style"
        )
    return pairs


def _first_token(processor, side: Side) -> int:
    """Return the first token of the right answer."""
    return processor.answer_ids(side[1].answer)[0]


def grid(
    config: ml_collections.ConfigDict, model, picture_rows: np.ndarray
) -> dict[str, list[Edits]]:
    """Return the edits of each column, by layer; the partners are the second half of a batch.

    Args:
      config: The settings of the study.
      model: The model.
      picture_rows: bool[rows, B, T], see the function `picture_rows`.
    """
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
    own, partner = np.arange(config.batch_size), np.arange(config.batch_size) + config.batch_size
    where = {f"picture row {r}": tok.mask(mask) for r, mask in enumerate(picture_rows)}
    where = where or {"picture": tok.image}  # for a Q-Former, whose tokens are not on a grid
    where |= {"question": tok.question, "last token": tok.last}
    return {
        name: [mj.patch(S.lm.resid_post[i], partner, own, where=w) for i in layers]
        for name, w in where.items()
    }


def picture_rows(tokens: tok.TokenMap, layouts: Sequence[Layout], count: int) -> np.ndarray:
    """Return bool[count, B, T], the image tokens of each row of the pictures.

    A picture with more rows is divided into this many bands. If a picture is split into tiles, a
    band contains its tokens in the parts and in the whole picture.

    Args:
      tokens: The token map of a batch of one picture per row.
      layouts: How the picture of each row is read.
      count: The number of rows, at most that of each picture.
    """
    masks = np.zeros((count, *np.shape(tokens.kind)), bool)
    for b, layout in enumerate(layouts):
        for positions in layout.grids(tokens, b):
            band = np.arange(len(positions)) * count // max(len(positions), 1)
            masks[band[:, None], b, positions] = True
    return masks


def _row_count(study: Context, pairs: list[Pair]) -> int:
    """Return the smallest number of rows of a picture; 0 if tokens are not on a grid."""
    config = study.model.config
    if config.token_grid or not config.depends_on_size:
        return config.token_grid  # of each tile
    sizes = {own.image.size[::-1] for (own, _), _ in pairs}
    return min(study.processor.layout(size).grid[0] for size in sizes) // config.merge


def _measure(study: Context, pairs: list[Pair]) -> tuple[np.ndarray, list[str]]:
    """Return float32[columns, L, pairs], the effects of all edits on all pairs, and the columns."""
    size, rows = study.config.batch_size, _row_count(study, pairs)
    length = batching.row_length(study.processor, [side for pair in pairs for side in pair])
    steps = [
        study.workdir.arrays(
            f"pairs-{start}",
            functools.partial(_effects, study, pairs[start : start + size], rows, length),
        )
        for start in range(0, len(pairs), size)
    ]
    return np.concatenate([step["effect"] for step in steps], -1), steps[0]["columns"].tolist()


def _effects(study: Context, pairs: list[Pair], rows: int, length: int) -> dict[str, np.ndarray]:
    """Measure the effects of all edits on some pairs.

    Args:
      study: The study.
      pairs: The pairs.
      rows: The number of rows into which pictures are divided.
      length: The number of tokens of a row of the batch.

    Returns:
      `effect`, float32[columns, L, pairs]: the change of the log-odds by each edit; `columns`.
    """
    model, processor = study.model, study.processor
    count, size = len(pairs), study.config.batch_size
    filled = pairs + pairs[:1] * (size - count)  # one shape for all batches
    sides = [own for own, _ in filled] + [partner for _, partner in filled]
    sizes = [own.image.size for (own, _), _ in filled] * 2
    images = [example.image for example, _ in sides]
    if model.config.depends_on_size:  # a partner's tokens must correspond to those of the picture
        images = [image.resize(size) for image, size in zip(images, sizes, strict=True)]
    batch = processor(images, [q.prompt for _, q in sides], length=length)
    layouts = [processor.layout(size[::-1]) for size in sizes]
    columns = grid(study.config, model, picture_rows(batch.tokens, layouts, rows))
    words = np.array([_first_token(processor, side) for side in sides], np.int32).reshape(2, size)
    metric = jax.tree_util.Partial(log_odds, own=words[0], other=words[1])
    clean = np.asarray(metric(mj.run(model, batch)))
    effects: dict[str, np.ndarray] = {}
    for names in _by_site(columns):
        edits = [edit for name in names for edit in columns[name]]
        swept = mj.sweep(metric, model, batch, edits, label=names[0])
        effects |= dict(zip(names, swept.reshape(len(names), -1, size) - clean, strict=True))
    return {
        "effect": np.stack([effects[name] for name in columns])[..., :count],
        "columns": np.array(list(columns)),
    }


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
