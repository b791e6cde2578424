"""The steps of the training of a projector, or of more; see `experiments/train/__main__.py`."""

from __future__ import annotations

import dataclasses
import os
import shutil

import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context, examples
from experiments.context import Context
from experiments.train import plots
from mllm_jax import store
from mllm_jax.data import batching, features
from mllm_jax.loading import save
from mllm_jax.report import style, tables
from mllm_jax.sharding import hosts
from mllm_jax.training import fit, parts, start


def run(config: ml_collections.ConfigDict, workdir: store.Workdir) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_projector.py.
      workdir: The folder of its checkpoints and results.
    """
    recipe = fit.Recipe.of(config.recipe.to_dict())
    model, processor = mj.load(config.model, projector=config.projector or None, seed=config.seed)
    study = Context(config=config, workdir=workdir, model=model, processor=processor)
    train = examples.examples_of(config, "train", config.train_per_domain)
    test = examples.examples_of(config, "test", config.test_per_domain)
    study.claim({"train": context.content(train), "test": context.content(test)})
    train_features, test_features = (
        features.vision_features(
            model, processor, split, workdir / "features" / f"{name}.npy",
            label=f"features, {name}",
        )
        for name, split in (("train", train), ("test", test))
    )  # fmt: skip
    if config.projector == "random":
        count = len(train_features)
        rows = np.random.default_rng(config.seed).choice(count, min(64, count), replace=False)
        sample = features.features_batch(
            processor, [train[i] for i in np.sort(rows)], train_features[np.sort(rows)]
        )
        model = start.scale_projector(
            model, np.asarray(sample.features), features.is_patch(model, sample)
        )

    batches = batching.PackedQuestions(
        processor, train, train_features, size=config.batch_size, steps=config.steps,
        questions=config.questions, seed=config.seed, styles=tuple(config.styles),
    )  # fmt: skip
    tests = batching.PackedQuestions(
        processor, test, test_features, size=config.batch_size,
        steps=len(test) // config.batch_size, questions=config.questions, seed=None,
        styles=tuple(config.styles),
    )  # fmt: skip
    wrong = dataclasses.replace(tests, shift=1)  # each question about another picture
    before = workdir.json("before", lambda: fit.evaluate(model, tests, wrong, label="loss before"))
    model, curve = fit.fit(model, batches, recipe, save=workdir / "checkpoints")
    after = workdir.json("after", lambda: fit.evaluate(model, tests, wrong, label="loss after"))

    if recipe.part == "projector":
        save.write_projector(model, workdir / "projector.safetensors")
    else:
        if hosts.is_primary():
            shutil.rmtree(workdir / "model", ignore_errors=True)  # an earlier run's, equal or stale
        save.save_hf(model, processor, workdir / "model")
    trained = parts.partition(model, recipe.part, lora=recipe.lora).trained
    results = {
        "study": "train",
        "recipe": dataclasses.asdict(recipe),
        "trained_parameters": parts.size(trained),
        "train_images": len(train),
        "test_images": len(test),
        "steps": config.steps,
        "loss_before": {"right": before[0], "wrong": before[1]},
        "loss_after": {"right": after[0], "wrong": after[1]},
        "trained_model": store.fingerprint(model),
    }

    def write_curve(folder: os.PathLike, results: dict) -> None:
        tables.write(workdir / "loss.csv", ("step", "loss"), enumerate(map(float, curve), 1))
        style.save(plots.loss_curve(curve, *after), workdir / "figures" / "loss.png")

    study.finish(results, write_curve, seed=config.seed)
    print(f"held-out loss {before[0]:.3f} -> {after[0]:.3f}; with the wrong picture {after[1]:.3f}")
