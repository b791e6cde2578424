"""Which neurons make the answer: attribution of all gates of a site in one backward pass.

    python -m experiments.attribution --config=configs/embedded_attribution.py --workdir=DIR

Every unit of a site gets a gate, which is 1. The metric is the log-likelihood of the right answer,
or its difference from that of a wrong option. Gates are attributed by integrated gradients, or to
first order, over the training pictures of each domain; then the top units are switched off on
test pictures, beside random units, as many in every layer, to see whether the attribution holds.

Leaves in the workdir: `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`,
`manifest.json`, and `attribution.npz` with the whole arrays by domain. `--edits` change the model
that is studied.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.attribution", takes=("edits",), rows={"batch_size": 1})

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax.analysis import attribution, domain_neurons, intervals
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.passes import score
from mllm_jax.report import attribution as page

METRICS = {"answer": (1.0,), "difference": (1.0, -1.0)}  # weights of the right and a wrong option


@dataclasses.dataclass(frozen=True)
class Study:
    """What every step reads: the config, the folder, the model, and the pictures by domain."""

    config: Any
    workdir: store.Workdir
    model: Any
    processor: Any
    train: dict[str, list]
    test: dict[str, list]
    edits: Edits

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(layers, units) of the site: the shape of the gates."""
        site = S.get(self.config.site)
        _, batch, *_ = next(self.batches(next(iter(self.train.values()))))
        spec = look_up(site, site_shapes(self.model, batch))
        return spec.layers, spec.shape[site.unit_axis]

    @functools.cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest answer, so that batches are alike."""
        every = [e for half in (self.train, self.test) for some in half.values() for e in some]
        pairs = batching.ask(every, self.config.styles)
        answers = {option for _, question in pairs for option in question.options}
        longest = score.answer_length(self.processor, answers)
        return batching.row_length(self.processor, pairs), longest

    def batches(self, examples: list) -> Iterator[tuple[int, Any, np.ndarray, np.ndarray]]:
        """(rows, batch, candidates int32[B, C, A], weights float32[B, C]); one question a row."""
        pairs, (length, answer) = batching.ask(examples, self.config.styles), self.lengths
        asked = batching.QuestionBatches(self.processor, pairs, self.config.batch_size, length)
        weights = np.array(METRICS[self.config.metric], np.float32)
        for i in range(len(asked)):
            options = [_options(question)[: len(weights)] for _, question in asked.rows(i)]
            ids = score.candidate_ids(self.processor, options, asked.size, length=answer)
            real = np.arange(asked.size) < len(options)
            batch = asked[i]
            if not self.config.site.startswith("vision."):
                batch = study.with_features(self.model, batch, self.edits)
            yield len(options), batch.replace(processor=None), ids, weights * real[:, None]


def _options(question) -> tuple[str, str]:
    """The right answer and a wrong one."""
    wrong = next(option for option in question.options if option != question.answer)
    return question.answer, wrong


def run(config, workdir: store.Workdir, edits: Edits | None = None) -> None:
    if config.metric not in METRICS:
        raise ValueError(f"config.metric={config.metric!r} is none of {', '.join(METRICS)}")
    S.get(config.site)  # a site that is none is said before anything is read
    model, processor = mj.load(config.model)
    train, test = (
        {name: list(domain)[:count] for name, domain in study.domains_of(config, half).items()}
        for half, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    )
    data = {
        half: {name: study.content(some) for name, some in by_name.items()}
        for half, by_name in (("train", train), ("test", test))
    }
    study.claim(workdir, config, model, processor, data)
    this = Study(config, workdir, model, processor, train, test, edits or Edits())
    found = {
        name: workdir.arrays(f"attribution-{name}", functools.partial(attribute, this, name))
        for name in train
    }
    mean = {name: arrays["values"] / arrays["examples"] for name, arrays in found.items()}
    results = {
        "study": "attribution",
        "model": config.model,
        "site": config.site,
        "metric": config.metric,
        "steps": config.steps,
        "domains": list(train),
        "layers": this.shape[0],
        "units": this.shape[1],
        "examples": {name: int(arrays["examples"]) for name, arrays in found.items()},
        "complete": {name: _complete(arrays) for name, arrays in found.items()},
        "by_layer": {name: _by_layer(values) for name, values in mean.items()},
        "top": {name: _top(values, config.top) for name, values in mean.items()},
        "ablation": [row for name in test for row in ablate(this, name, mean[name])],
    } | study.named(workdir)
    store.atomic_npz(workdir / "attribution.npz", mean)
    store.atomic_json(workdir / "results.json", results)
    page.write(workdir.path, results)
    store.write_manifest(workdir)
    print(f"finished: {workdir / 'index.html'}")


def attribute(this: Study, name: str) -> dict[str, np.ndarray]:
    """Attributions float64[L, F] summed over the questions of a domain, and the metric.

    `opened` and `closed` are the metric, summed likewise, of the model as it is and with all gates
    at 0: the attributions of integrated gradients add up to their difference.
    """
    gates = np.ones(this.shape, np.float32)
    values = np.zeros(this.shape, np.float64)
    examples, opened, closed = 0, 0.0, 0.0
    count = -(-len(this.train[name]) // this.config.batch_size)
    batches = tqdm.tqdm(this.batches(this.train[name]), f"attribute, {name}", count, leave=False)
    for rows, *read in batches:
        found, off = _attribute(
            this.model, *read, this.edits, gates,
            site=S.get(this.config.site), steps=this.config.steps,
        )  # fmt: skip
        values += found.values
        examples, opened, closed = examples + rows, opened + found.metric, closed + off
    return {
        "values": values, "examples": np.int64(examples),
        "opened": np.float64(opened), "closed": np.float64(closed),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames=("site", "steps"))
def _attribute(model, batch, ids, weights, edits, gates, *, site, steps):
    def metric(gates):
        return _metric(model, batch, ids, weights, edits >> mj.scale(site, gates)).sum()

    if steps:
        found = attribution.integrated(metric, gates, steps=steps)
    else:
        found = attribution.first_order(metric, gates)
    return found, metric(jnp.zeros_like(gates))


def _metric(model, batch, ids, weights, edits) -> jax.Array:
    """float32[B]: weighted log-likelihoods of the candidates of each row."""
    scores = mj.score(model, batch, ids, edits)
    return jnp.where(weights != 0, scores * weights, 0).sum(-1)


def ablate(this: Study, name: str, values: np.ndarray) -> list[dict[str, Any]]:
    """Change of the metric on test questions with the top units off, and with random ones."""
    site = S.get(this.config.site)

    batches = functools.cache(lambda: list(this.batches(this.test[name])))

    def measure(mask) -> dict[str, np.ndarray]:
        edits = this.edits if mask is None else this.edits >> mj.ablate(site[mask])
        found = [np.asarray(_metric(this.model, *read, edits))[:rows] for rows, *read in batches()]
        return {"metric": np.concatenate(found)}

    clean = this.workdir.arrays(f"ablation/{name}/clean", lambda: measure(None))["metric"]
    rows = []
    for count in this.config.off:
        mask = attribution.top_mask(values, count)
        masks = {"top": mask} | {
            f"random{seed}": domain_neurons.random_mask_like(mask, seed)
            for seed in range(this.config.controls)
        }
        for kind, off in masks.items():
            step = f"ablation/{name}/{count}-{kind}"
            edited = this.workdir.arrays(step, functools.partial(measure, off))["metric"]
            change = intervals.paired_difference(clean, edited)
            rows.append(
                {
                    "domain": name, "off": count, "units": kind, "clean": float(clean.mean()),
                    "change": float(change.value), "low": float(change.low),
                    "high": float(change.high), "n": len(clean),
                }
            )  # fmt: skip
    return rows


def _complete(found: dict[str, np.ndarray]) -> dict[str, float]:
    """What the attributions add up to, and what closing all gates changes; per question."""
    n = found["examples"]
    return {
        "metric": float(found["opened"] / n),
        "sum": float(found["values"].sum() / n),
        "change": float((found["opened"] - found["closed"]) / n),
    }


def _by_layer(values: np.ndarray) -> dict[str, list[float]]:
    return {
        "for": np.maximum(values, 0).sum(-1).tolist(),
        "against": np.minimum(values, 0).sum(-1).tolist(),
    }


def _top(values: np.ndarray, count: int) -> list[list]:
    """[layer, unit, attribution] of the top units."""
    return [
        [int(layer), int(unit), float(values[layer, unit])]
        for layer, unit in attribution.top(values, count)
    ]
