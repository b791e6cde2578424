"""The steps of the mask study; see `experiments/mask/__main__.py`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import mllm_jax as mj
from experiments import context, examples
from experiments.context import Context
from experiments.mask import page
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax.analysis import domain_neurons, intervals
from mllm_jax.batch import Batch
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.sites import Site
from mllm_jax.training import edits as training
from mllm_jax.training import lenses


class Read(NamedTuple):
    """One batch of prompts and the answers of the clean model.

    Attributes:
      batch: The prompts.
      real: bool[B], whether a row is a question, not padding.
      clean: float32[B, V], the log-probabilities of the clean model's next word.
    """

    batch: Any
    real: np.ndarray
    clean: jax.Array


def run(
    config: ml_collections.ConfigDict, workdir: store.Workdir, edits: Edits | None = None
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_mask.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
    """
    context.require_choice("config.gate", config.gate, training.GATES)
    site = S.get(config.site)
    model, processor = mj.load(config.model)
    questions = {
        split: batching.ask(examples.examples_of(config, split, count), config.styles)
        for split, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    }
    study = Context(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits()
    )
    study.claim({split: context.content(pairs) for split, pairs in questions.items()})
    train, test = (_batches(study, pairs) for pairs in questions.values())
    spec = look_up(site, site_shapes(model, train[0].batch))
    shape = spec.layers, spec.shape[site.unit_axis]
    trained = workdir.arrays("learned", lambda: train_gates(study, train, site, shape))
    kept = trained["gates"] > 0.5
    masks = {"learned": kept} | {
        f"random{seed}": domain_neurons.random_mask_like(kept, seed)
        for seed in range(config.controls)
    }
    tested = {
        name: workdir.arrays(f"test-{name}", functools.partial(measure, study, test, site, mask))
        for name, mask in masks.items()
    }
    results = {
        "study": "mask",
        "model": config.model,
        "site": site.name,
        "gate": config.gate,
        "penalty": config.penalty,
        "steps": config.steps,
        "layers": shape[0],
        "units": shape[1],
        "kept": int(kept.sum()),
        "kept_by_layer": kept.sum(-1).tolist(),
        "test": {name: _summary(arrays) for name, arrays in tested.items()},
    }
    with store.atomic(workdir / "off.npy") as file:
        np.save(file, ~kept)
    study.finish(
        results,
        lambda folder, content: page.write(folder, content, trained["curve"]),
        seed=config.seed,
    )
    print(f"finished: {workdir / 'index.html'}")


def _batches(study: Context, pairs: list[tuple[Any, Any]]) -> list[Read]:
    """Return the prompts of all questions, with the next word of the clean model."""
    config, processor = study.config, study.processor
    length = batching.row_length(processor, pairs)
    questions = batching.QuestionBatches(processor, pairs, config.batch_size, length)
    reads = []
    for i in range(len(questions)):
        batch = questions[i]
        if not config.site.startswith("vision."):
            batch = study.with_features(batch)
        batch = batch.replace(processor=None)
        clean = _log_probs(study.model, batch, study.edits)
        real = np.arange(questions.size) < len(questions.rows(i))
        reads.append(Read(batch, real, clean))
    return reads


def _log_probs(model: Any, batch: Batch, edits: Edits) -> jax.Array:
    """Return float32[B, V], the log-probabilities of the next word."""
    logits = mj.run(model, batch, edits).logits
    assert logits is not None  # `run` returns those of the last token by default
    return jax.nn.log_softmax(logits)


def train_gates(
    study: Context, batches: list[Read], site: Site, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the trained `gates`, float32[L, F], and the `curve` of losses."""
    config = study.config
    gate = training.GATES[config.gate]

    def loss(logits, model, read: Read, key):
        scaled = study.edits >> mj.scale(site, gate.draw(logits, key))
        kl, _ = divergence(model, read, scaled)
        kl = jnp.where(read.real, kl, 0).sum() / read.real.sum()
        return kl + config.penalty * gate.cost(logits).mean()

    order = [batches[step % len(batches)] for step in range(config.steps)]
    start = np.full(shape, config.start, np.float32)
    logits, curve = training.learn(
        loss, start, study.model, order, optax.adam(config.rate), seed=config.seed, label="gates"
    )
    return {"gates": np.asarray(gate.final(logits)), "curve": curve}


def divergence(model, read: Read, edits: Edits) -> tuple[jax.Array, jax.Array]:
    """Compare the next word with that of the clean model.

    Returns:
      float32[B], KL(clean, edited) in nats; bool[B], whether the most likely word is the same.
    """
    edited = _log_probs(model, read.batch, edits)
    return lenses.kl(read.clean, edited), read.clean.argmax(-1) == edited.argmax(-1)


def measure(
    study: Context, batches: list[Read], site: Site, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the divergence and agreement of each question, with only the units of a mask."""
    edits = study.edits >> mj.scale(site, mask.astype(np.float32))
    parts = [
        [np.asarray(part)[read.real] for part in divergence(study.model, read, edits)]
        for read in batches
    ]
    kl, same = map(np.concatenate, zip(*parts, strict=True))
    return {"divergence": kl, "agreement": same.astype(np.float32)}


def _summary(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    means = {name: intervals.mean(values) for name, values in arrays.items()}
    return {
        name: {"mean": float(mean), "low": float(low), "high": float(high)}
        for name, (mean, low, high) in means.items()
    }
