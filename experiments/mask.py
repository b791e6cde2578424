"""Which units the answer needs: a mask learned by gradients, weighed against its size.

    python -m experiments.mask --config=configs/embedded_mask.py --workdir=DIR

Every unit of a site gets a gate (hard concrete, or sigmoid). Gates are learned so that the next
word is distributed as without them (KL divergence), while each gate that is open costs. On test
pictures the learned mask is compared with random ones, as many units in every layer.

Leaves in the workdir: `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`,
`manifest.json`, and `off.npy`, bool[L, F], an address: `--edits='ablate lm.mlp.act[@DIR/off.npy]'`.
`--edits` change the model that is studied.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.mask", takes=("edits",), rows={"batch_size": 1})

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mllm_jax as mj
from experiments import study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax.analysis import domain_neurons, intervals
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.report import learned as page
from mllm_jax.training import edits as learning


def run(config, workdir: store.Workdir, edits: Edits | None = None) -> None:
    if config.gate not in learning.GATES:
        raise ValueError(f"config.gate={config.gate!r} is none of {', '.join(learning.GATES)}")
    site, edits = S.get(config.site), edits or Edits()
    model, processor = mj.load(config.model)
    asked = {
        half: batching.ask(study.examples_of(config, half, count), config.styles)
        for half, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    }
    data = {half: study.content(pairs) for half, pairs in asked.items()}
    study.claim(workdir, config, model, processor, data)
    train, test = (_batches(config, model, processor, edits, pairs) for pairs in asked.values())
    spec = look_up(site, site_shapes(model, train[0]["batch"]))
    shape = spec.layers, spec.shape[site.unit_axis]
    found = workdir.arrays("learned", lambda: learn(config, model, train, site, shape, edits))
    kept = found["gates"] > 0.5
    masks = {"learned": kept} | {
        f"random{seed}": domain_neurons.random_mask_like(kept, seed)
        for seed in range(config.controls)
    }
    measured = {
        name: workdir.arrays(
            f"test-{name}", functools.partial(measure, model, test, site, mask, edits)
        )
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
        "test": {name: _summary(arrays) for name, arrays in measured.items()},
    } | study.named(workdir)
    with store.atomic(workdir / "off.npy") as file:
        np.save(file, ~kept)
    store.atomic_json(workdir / "results.json", results)
    page.write_mask(workdir.path, results, found["curve"])
    store.write_manifest(workdir, seed=config.seed)
    print(f"finished: {workdir / 'index.html'}")


def _batches(config, model, processor, edits: Edits, pairs: list) -> list[dict[str, Any]]:
    """Prompts of all domains in turn, which rows are real, and the clean model's next word."""
    length = batching.row_length(processor, pairs)
    asked = batching.QuestionBatches(processor, pairs, config.batch_size, length)
    made = []
    for i in range(len(asked)):
        batch = asked[i]
        if not config.site.startswith("vision."):
            batch = study.with_features(model, batch, edits)
        batch = batch.replace(processor=None)
        clean = jax.nn.log_softmax(mj.run(model, batch, edits).logits)
        real = np.arange(asked.size) < len(asked.rows(i))
        made.append({"batch": batch, "real": real, "clean": clean})
    return made


def learn(config, model, batches, site, shape, edits: Edits) -> dict[str, np.ndarray]:
    """The gates float32[L, F] that were learned, and the loss of each step."""
    gate = learning.GATES[config.gate]

    def loss(logits, model, read, key):
        apart, _ = divergence(model, read, edits >> mj.scale(site, gate.draw(logits, key)))
        apart = jnp.where(read["real"], apart, 0).sum() / read["real"].sum()
        return apart + config.penalty * gate.cost(logits).mean()

    order = [batches[step % len(batches)] for step in range(config.steps)]
    start = np.full(shape, config.start, np.float32)
    logits, curve = learning.learn(
        loss, start, model, order, optax.adam(config.rate), seed=config.seed, label="gates"
    )
    return {"gates": np.asarray(gate.settle(logits)), "curve": curve}


def divergence(model, read: dict[str, Any], edits: Edits) -> tuple[jax.Array, jax.Array]:
    """float32[B], nats: KL(clean, edited) of the next word; bool[B]: whether it is the same."""
    edited = jax.nn.log_softmax(mj.run(model, read["batch"], edits).logits)
    clean = read["clean"]
    apart = jnp.sum(jnp.exp(clean) * (clean - edited), -1)
    return apart, clean.argmax(-1) == edited.argmax(-1)


def measure(model, batches, site, mask, edits: Edits) -> dict[str, np.ndarray]:
    """Divergence and agreement of each test question with only the units of the mask on."""
    edits = edits >> mj.scale(site, mask.astype(np.float32))
    found = [
        [np.asarray(part)[read["real"]] for part in divergence(model, read, edits)]
        for read in batches
    ]
    apart, same = map(np.concatenate, zip(*found, strict=True))
    return {"divergence": apart, "agreement": same.astype(np.float32)}


def _summary(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    found = {name: intervals.mean(values) for name, values in arrays.items()}
    return {
        name: {"mean": float(mean), "low": float(low), "high": float(high)}
        for name, (mean, low, high) in found.items()
    }
