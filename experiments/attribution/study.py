"""The steps of the attribution study; see `experiments/attribution/__main__.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import context, examples
from experiments.attribution import page
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax.analysis import attribution, domain_neurons, intervals
from mllm_jax.data import batching, domains
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.passes import score

METRICS = {"answer": (1.0,), "difference": (1.0, -1.0)}  # weights of the right and a wrong option
Pictures = dict[str, list[domains.Example]]  # by domain


class Read(NamedTuple):
    """One batch of questions, with the weights of its candidates.

    Attributes:
      rows: The number of questions; the other rows are empty.
      batch: The prompts.
      candidates: int32[B, C, A], the options as tokens.
      weights: float32[B, C], the weights of the options in the metric.
    """

    rows: int
    batch: Any
    candidates: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the study.

    Attributes:
      train: The pictures by domain on which gates are attributed.
      test: The pictures by domain on which units are ablated.
    """

    train: Pictures
    test: Pictures

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """The shape of the gates: (layers, units) of the site."""
        site = S.get(self.config.site)
        first = next(self.batches(next(iter(self.train.values()))))
        spec = look_up(site, site_shapes(self.model, first.batch))
        return spec.layers, spec.shape[site.unit_axis]

    @functools.cached_property
    def lengths(self) -> tuple[int, int]:
        """The tokens of the longest prompt and of the longest answer, to which all are padded."""
        pictures = [e for split in (self.train, self.test) for part in split.values() for e in part]
        pairs = batching.ask(pictures, self.config.styles)
        answers = {option for _, question in pairs for option in question.options}
        longest = score.answer_length(self.processor, answers)
        return batching.row_length(self.processor, pairs), longest

    def batches(self, pictures: list[domains.Example]) -> Iterator[Read]:
        """Yield batches of one question per row."""
        pairs, (length, answer) = batching.ask(pictures, self.config.styles), self.lengths
        questions = batching.QuestionBatches(self.processor, pairs, self.config.batch_size, length)
        weights = np.array(METRICS[self.config.metric], np.float32)
        for i in range(len(questions)):
            options = [_options(question)[: len(weights)] for _, question in questions.rows(i)]
            ids = score.candidate_ids(self.processor, options, questions.size, length=answer)
            real = np.arange(questions.size) < len(options)
            batch = questions[i]
            if not self.config.site.startswith("vision."):
                batch = self.with_features(batch)
            yield Read(len(options), batch.replace(processor=None), ids, weights * real[:, None])


def _options(question) -> tuple[str, str]:
    """Return the right answer and a wrong one."""
    wrong = next(option for option in question.options if option != question.answer)
    return question.answer, wrong


def run(
    config: ml_collections.ConfigDict, workdir: store.Workdir, edits: Edits | None = None
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_attribution.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
    """
    context.require_choice("config.metric", config.metric, METRICS)
    S.get(config.site)  # refuse an unknown site before anything is read
    model, processor = mj.load(config.model)
    train, test = (
        {name: list(domain)[:count] for name, domain in examples.domains_of(config, split).items()}
        for split, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    )
    study = Study(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits(),
        train=train, test=test,
    )  # fmt: skip
    study.claim(
        {
            split: {name: context.content(pictures) for name, pictures in by_name.items()}
            for split, by_name in (("train", train), ("test", test))
        }
    )
    attributions = {
        name: workdir.arrays(f"attribution-{name}", functools.partial(attribute, study, name))
        for name in train
    }
    mean = {name: arrays["values"] / arrays["examples"] for name, arrays in attributions.items()}
    results = {
        "study": "attribution",
        "model": config.model,
        "site": config.site,
        "metric": config.metric,
        "steps": config.steps,
        "domains": list(train),
        "layers": study.shape[0],
        "units": study.shape[1],
        "examples": {name: int(arrays["examples"]) for name, arrays in attributions.items()},
        "completeness": {name: _completeness(a) for name, a in attributions.items()},
        "by_layer": {name: _by_layer(values) for name, values in mean.items()},
        "top": {name: _top(values, config.top) for name, values in mean.items()},
        "ablation": [row for name in test for row in ablate(study, name, mean[name])],
    }
    store.atomic_npz(workdir / "attribution.npz", mean)
    study.finish(results, page.write)
    print(f"finished: {workdir / 'index.html'}")


def attribute(study: Study, name: str) -> dict[str, np.ndarray]:
    """Return the attributions of a domain, summed over its questions.

    Returns:
      `values`, float64[L, F]; `examples`, the number of questions; `opened` and `closed`, the
      metric with all gates at 1 and at 0, summed likewise. The attributions of integrated
      gradients add up to the difference of the two.
    """
    gates = np.ones(study.shape, np.float32)
    values = np.zeros(study.shape, np.float64)
    count, opened, closed = 0, 0.0, 0.0
    total = -(-len(study.train[name]) // study.config.batch_size)
    batches = tqdm.tqdm(study.batches(study.train[name]), f"attribute, {name}", total, leave=False)
    for read in batches:
        attributed, metric_closed = _attribute(
            study.model, read.batch, read.candidates, read.weights, study.edits, gates,
            site=S.get(study.config.site), steps=study.config.steps,
        )  # fmt: skip
        values += attributed.values
        count += read.rows
        opened, closed = opened + attributed.metric, closed + metric_closed
    return {
        "values": values, "examples": np.asarray(count, np.int64),
        "opened": np.asarray(opened, np.float64), "closed": np.asarray(closed, np.float64),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames=("site", "steps"))
def _attribute(model, batch, candidates, weights, edits, gates, *, site, steps):
    def metric(gates):
        scaled = edits >> mj.scale(site, gates)
        return _metric(model, batch, candidates, weights, scaled).sum()

    if steps:
        attributed = attribution.integrated(metric, gates, steps=steps)
    else:
        attributed = attribution.first_order(metric, gates)
    return attributed, metric(jnp.zeros_like(gates))


def _metric(model, batch, candidates, weights, edits: Edits) -> jax.Array:
    """Return float32[B], the weighted log-likelihoods of the candidates of each row."""
    scores = mj.score(model, batch, candidates, edits)
    return jnp.where(weights != 0, scores * weights, 0).sum(-1)


def ablate(study: Study, name: str, values: np.ndarray) -> list[dict[str, Any]]:
    """Ablate the top units, and random ones, and return the change of the metric on test questions.

    Args:
      study: The study.
      name: The name of the domain.
      values: float64[L, F], the attributions of the domain.
    """
    site = S.get(study.config.site)

    batches = functools.cache(lambda: list(study.batches(study.test[name])))

    def measure(mask: np.ndarray | None) -> dict[str, np.ndarray]:
        edits = study.edits if mask is None else study.edits >> mj.ablate(site[mask])
        parts = [
            np.asarray(_metric(study.model, *read[1:], edits))[: read.rows] for read in batches()
        ]
        return {"metric": np.concatenate(parts)}

    clean = study.workdir.arrays(f"ablation/{name}/clean", lambda: measure(None))["metric"]
    rows = []
    for count in study.config.off:
        top = attribution.top_mask(values, count)
        masks = {"top": top} | {
            f"random{seed}": domain_neurons.random_mask_like(top, seed)
            for seed in range(study.config.controls)
        }
        for kind, mask in masks.items():
            step = f"ablation/{name}/{count}-{kind}"
            ablated = study.workdir.arrays(step, functools.partial(measure, mask))["metric"]
            change = intervals.paired_difference(clean, ablated)
            rows.append(
                {
                    "domain": name, "ablated": count, "units": kind, "clean": float(clean.mean()),
                    "change": float(change.value), "low": float(change.low),
                    "high": float(change.high), "n": len(clean),
                }
            )  # fmt: skip
    return rows


def _completeness(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the sum of the attributions, and the change by closing all gates, per question."""
    n = arrays["examples"]
    return {
        "metric": float(arrays["opened"] / n),
        "sum": float(arrays["values"].sum() / n),
        "change": float((arrays["opened"] - arrays["closed"]) / n),
    }


def _by_layer(values: np.ndarray) -> dict[str, list[float]]:
    return {
        "for": np.maximum(values, 0).sum(-1).tolist(),
        "against": np.minimum(values, 0).sum(-1).tolist(),
    }


def _top(values: np.ndarray, count: int) -> list[list[float]]:
    """Return [layer, unit, attribution] of the top units."""
    return [
        [int(layer), int(unit), float(values[layer, unit])]
        for layer, unit in attribution.top(values, count)
    ]
