"""Trains the projector of a model on visual domains, all else frozen.

    python -m experiments.train --config=configs/embedded_projector.py --workdir=DIR

Leaves in the workdir: `projector.safetensors`, `results.json`, `loss.csv`, `figures/loss.png`.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.train", eigen=True, rows={"batch_size": 1})

import dataclasses

import numpy as np

import mllm_jax as mj
from experiments import study
from mllm_jax import store
from mllm_jax.data import batching, features
from mllm_jax.loading import save
from mllm_jax.report import figures, tables, training
from mllm_jax.training import fit, parts, start


def run(config, workdir: store.Workdir) -> None:
    model, processor = mj.load(config.model, projector=config.projector, seed=config.seed)
    train = study.examples_of(config, "train", config.train_per_domain)
    test = study.examples_of(config, "test", config.test_per_domain)
    study.claim(
        workdir,
        config,
        model,
        processor,
        {"train": study.content(train), "test": study.content(test)},
    )
    seen = features.vision_features(
        model, processor, train, workdir / "features" / "train.npy", label="features, train"
    )
    held = features.vision_features(
        model, processor, test, workdir / "features" / "test.npy", label="features, test"
    )
    sample = np.random.default_rng(config.seed).choice(len(seen), min(64, len(seen)), replace=False)
    if config.projector == "random":
        model = start.scale_projector(model, seen[np.sort(sample)])

    batches = batching.PackedQuestions(
        processor, train, seen, size=config.batch_size, steps=config.steps,
        questions=config.questions, seed=config.seed, styles=tuple(config.styles),
    )  # fmt: skip
    tests = batching.PackedQuestions(
        processor, test, held, size=config.batch_size, steps=len(test) // config.batch_size,
        questions=config.questions, seed=None, styles=tuple(config.styles),
    )  # fmt: skip
    recipe = fit.Recipe.of(config.recipe.to_dict())
    before = workdir.json("before", lambda: fit.evaluate(model, tests, label="loss before"))
    model, curve = fit.fit(model, batches, recipe, save=workdir / "checkpoints")
    after = workdir.json("after", lambda: fit.evaluate(model, tests, label="loss after"))

    save.write_projector(model, workdir / "projector.safetensors")
    trained = parts.partition(model, recipe.part, lora=recipe.lora).trained
    tables.write(workdir / "loss.csv", ("step", "loss"), enumerate(map(float, curve), 1))
    figures.save(training.loss_curve(curve, *after), workdir / "figures" / "loss.png")
    store.atomic_json(
        workdir / "results.json",
        {
            "study": "train",
            "recipe": dataclasses.asdict(recipe),
            "trained_parameters": parts.size(trained),
            "train_images": len(train),
            "test_images": len(test),
            "steps": config.steps,
            "loss_before": {"right": before[0], "wrong": before[1]},
            "loss_after": {"right": after[0], "wrong": after[1]},
            "projector": store.fingerprint(trained),
        },
    )
    store.write_manifest(workdir, seed=config.seed)
    print(f"held-out loss {before[0]:.3f} -> {after[0]:.3f}; with the wrong picture {after[1]:.3f}")
