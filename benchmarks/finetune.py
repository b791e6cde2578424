"""Fine-tune the projector alone: a few steps of AdamW on batches of eight.

The shapes are those of the embedded model, with folded patches. transformers has no such model, so
the rivals assemble theirs from its parts. No side recomputes layers to save memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness, work
from mllm_jax.batch import Batch
from mllm_jax.interventions.tap import Taps
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.training import fit

RECIPE = fit.Recipe(rate=1e-3)


def sides(done: work.Work):
    """Return the sides of this library by name."""
    return {harness.OURS: steps(done, RECIPE)}


def steps(done: work.Work, recipe: fit.Recipe) -> Callable[[], harness.Result]:
    """Return what trains by a recipe on all batches and gives the loss of each step."""
    batches = [labelled(done, batch) for batch in folded_batches(done)]
    model = folded(done)
    batches = [b.replace(features=np.asarray(features(model, b)), pixels=None) for b in batches]
    return lambda: {"losses": fit.fit(model, batches, recipe)[1]}


@jax.jit
def features(model: MultimodalModel, batch: Batch) -> jax.Array:
    """Return the vision features of a batch."""
    return model.features(batch, Taps())


def config(done: work.Work) -> MultimodalConfig:
    """Return the config of the work, with patches folded into each image token."""
    unfolded, fold = done.size.config, done.size.fold
    return work.model_config(
        unfolded.vision, unfolded.lm, fold=fold, image_token=unfolded.image_token
    )


def folded(done: work.Work) -> MultimodalModel:
    """Return the model of the work with a projector of folded patches."""
    model = nnx.eval_shape(lambda: config(done).build(rngs=nnx.Rngs(0)))
    model.vision, model.lm = done.model.vision, done.model.lm
    model.projector = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, done.size.dtype), model.projector
    )
    for i, linear in enumerate(model.projector.linears):
        linear.kernel[...] = jnp.asarray(done.inputs[f"fold_kernel_{i}"], done.size.dtype)
    return model


def folded_batches(done: work.Work) -> list[Batch]:
    """Return the batches of all pictures, with folded image tokens."""
    folded_config, ids = config(done), done.inputs["ids"]
    image = np.full((len(ids), folded_config.image_tokens), folded_config.image_token)
    ids = np.concatenate([ids[:, :1], image, ids[:, 1 + done.size.config.image_tokens :]], 1)
    starts = range(0, len(ids), work.BATCH)
    return [
        work.to_batch(
            folded_config, ids[i : i + work.BATCH], done.inputs["pixels"][i : i + work.BATCH]
        )
        for i in starts
    ]


def labelled(done: work.Work, batch: Batch) -> Batch:
    """Return a batch whose last words are the answer."""
    T, A = batch.ids.shape[1], done.size.answer
    labels = np.broadcast_to(np.arange(T - A, T, dtype=np.int32), (len(batch.ids), A))
    return batch.replace(labels=labels)


BENCHMARK = harness.Benchmark(
    name="finetune",
    about="steps of AdamW on the projector, batches of eight, precomputed vision features",
    sides=sides,
    rivals=("hf_trainer", "hf_trainer_cached", "hf_careful"),
    bounds=(harness.faster("hf_trainer", 2), harness.faster("hf_trainer_cached", 1.2)),
    pictures=3 * work.BATCH,
    eigen=True,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
