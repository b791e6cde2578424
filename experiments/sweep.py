"""Where in the language model an answer is made: a grid of edits by layer, swept over.

    python -m experiments.sweep --config=configs/embedded_sweep.py:tokens --workdir=DIR

Pictures are taken in pairs of one domain and one question, with different answers. The metric is
the log-odds of the picture's own answer against that of its partner, at the first answer token.
The grid is layers by

* tokens: the residual of some tokens is that of the partner (causal tracing by interchange);
* heads: one attention head is off;
* parts: attention or MLP is off;
* strengths: the MLP is scaled.

Leaves in the workdir: `results.json`, `grid.csv`, `figures/grid.png`, `index.html`.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.sweep", eigen=True, rows={"batch_size": 2})

import jax
import numpy as np

import mllm_jax as mj
from experiments import study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import intervals
from mllm_jax.data import batching
from mllm_jax.report import figures, tables
from mllm_jax.report import sweep as report

GRIDS = ("tokens", "heads", "parts", "strengths")


def run(config, workdir: store.Workdir) -> None:
    if config.grid not in GRIDS:
        raise ValueError(f"config.grid={config.grid!r} is none of {', '.join(GRIDS)}")
    model, processor = mj.load(config.model)
    pairs = [
        pair
        for name, domain in study.domains_of(config, "test").items()
        for pair in partners(processor, name, list(domain), config.style, config.pairs_per_domain)
    ]
    study.claim(
        workdir,
        config,
        model,
        processor,
        {"pairs": study.content(one for pair in pairs for one in pair)},
    )
    columns = grid(config, model)
    size = config.batch_size
    length = batching.row_length(processor, [side for pair in pairs for side in pair])
    effects = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        step = workdir.arrays(
            f"pairs-{start}",
            lambda some=some: _effects(model, processor, some, columns, size, length),
        )
        effects.append(step["effect"])
    effect = np.concatenate(effects, -1)  # [columns, L, pairs]
    names = list(columns)
    found = intervals.mean(np.moveaxis(effect, -1, 0))
    value, low, high = (np.asarray(part).T for part in found)  # [L, columns]
    tables.write(
        workdir / "grid.csv", ("layer", "column", "effect", "low", "high"),
        [(layer, name, float(value[layer, i]), float(low[layer, i]), float(high[layer, i]))
         for layer in range(len(value)) for i, name in enumerate(names)],
    )  # fmt: skip
    figures.save(report.grid(value, names, low, high), workdir / "figures" / "grid.png")
    results = {
        "study": "sweep", "grid": config.grid, "columns": names, "pairs": len(pairs),
        "effect": value.tolist(), "low": low.tolist(), "high": high.tolist(),
        "domains": sorted({example.domain for pair in pairs for example, _ in pair}),
    }  # fmt: skip
    store.atomic_json(workdir / "results.json", results)
    report.write(workdir, results)
    store.write_manifest(workdir)
    print(f"finished: {workdir.path / 'index.html'}")


def partners(processor, name: str, examples: list, style: str, count: int) -> list:
    """Pairs of (example, question), of one prompt, whose answers begin with different tokens."""
    asked = batching.ask(examples, (style,))
    found, left = [], list(asked)
    while left and len(found) < count:
        one = left.pop(0)
        for i, other in enumerate(left):
            if one[1].prompt == other[1].prompt and _word(processor, one) != _word(
                processor, other
            ):
                found.append((one, left.pop(i)))
                break
    if not found:
        raise ValueError(
            f"domain {name} has no two pictures with one question of style {style} and "
            "different answers; name another config.style"
        )
    return found


def _word(processor, side) -> int:
    """The first token of the right answer."""
    return processor.answer_ids(side[1].answer)[0]


def grid(config, model) -> dict[str, list]:
    """The edits of each column by layer. The second half of a batch are the partners."""
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


def _effects(model, processor, pairs: list, columns: dict, size: int, length: int) -> dict:
    """float32[columns, L, pairs]: change of the log-odds by each edit."""
    count = len(pairs)
    filled = pairs + pairs[:1] * (size - count)  # one shape for all batches
    rows = [one for one, _ in filled] + [other for _, other in filled]
    batch = processor(
        [example.image for example, _ in rows], [q.prompt for _, q in rows], length=length
    )
    words = np.array([_word(processor, side) for side in rows], np.int32).reshape(2, size)
    metric = jax.tree_util.Partial(log_odds, own=words[0], other=words[1])
    clean = np.asarray(metric(mj.run(model, batch)))
    effects = {}
    for names in _alike(columns):
        edits = [edit for name in names for edit in columns[name]]
        found = mj.sweep(metric, model, batch, edits, label=names[0])
        effects |= dict(zip(names, found.reshape(len(names), -1, size) - clean, strict=True))
    return {"effect": np.stack([effects[name] for name in columns])[..., :count]}


def log_odds(out, own, other):
    """float32[pairs]: log-odds of the own answer against the partner's, of the first half."""
    logits = out.logits[: len(own)]
    rows = np.arange(len(own))
    return logits[rows, own] - logits[rows, other]


def _alike(columns: dict[str, list]) -> list[list[str]]:
    """The columns of one site together: they are one sweep."""
    by_site: dict[str, list[str]] = {}
    for name, edits in columns.items():
        by_site.setdefault(str(next(iter(edits[0])).address.site), []).append(name)
    return list(by_site.values())
