"""The steps of distributed alignment search; see `experiments/das/__main__.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import mllm_jax as mj
from experiments import context, examples
from experiments.das import page
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import intervals
from mllm_jax.data import batching, features
from mllm_jax.interventions.edits import Edits
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.passes import score
from mllm_jax.sharding import mesh
from mllm_jax.training import edits as training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the search.

    Attributes:
      prompt: The question to all pictures.
      labels: The C answers to it.
      ids: int32[C, A], the answers as tokens.
      length: The tokens of a row.
      features: float32[N, P, E], the vision features of the pictures, by split.
      sizes: The (height, width) of the pictures, by split, or None if the model does not need it.
    """

    prompt: str
    labels: list[str]
    ids: np.ndarray
    length: int
    features: Mapping[str, np.ndarray]
    sizes: Mapping[str, list[tuple[int, int]] | None]

    def batch(self, split: str, rows: np.ndarray):
        """Return the question to some pictures of a split."""
        prompts = [self.prompt] * len(rows)
        sizes = self.sizes[split]
        batch = self.processor(
            None, prompts, features=np.asarray(self.features[split][rows]), length=self.length,
            sizes=None if sizes is None else [sizes[row] for row in rows],
        )  # fmt: skip
        return batch.replace(processor=None)

    def scores(self, model, batch, edits: Edits, count: int) -> jax.Array:
        """Return float32[count, C], the log-likelihoods of all answers in the first rows."""
        ids = jnp.broadcast_to(self.ids, (len(batch.ids), *self.ids.shape))
        return mj.score(model, batch, ids, self.edits >> edits)[:count]


def run(
    config: ml_collections.ConfigDict, workdir: store.Workdir, edits: Edits | None = None
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_das.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass; none of the vision tower.
    """
    if any(edit.address.site.module == "vision" for edit in edits or ()):
        raise ValueError(
            "--edits: this study takes no edits of the vision tower, which it runs once"
        )
    model, processor = mj.load(config.model)
    _check_subspaces(config, model.config.lm)
    questions = {
        split: batching.ask(examples.examples_of(config, split, count), (config.style,))
        for split, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    }
    base = context.Context(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits()
    )
    base.claim({split: context.content(pairs) for split, pairs in questions.items()})
    study = _prepare(base, questions)
    answers = {
        split: workdir.arrays(f"answers-{split}", functools.partial(answer, study, split))["label"]
        for split in questions
    }
    curves, rows = {}, []
    for layer in config.layers:
        trained = workdir.arrays(
            f"learned-{layer}", functools.partial(train, study, layer, answers["train"])
        )
        curves[layer] = trained["curve"]
        with store.atomic(workdir / f"basis-{layer}.npy") as file:
            np.save(file, trained["basis"])
        rows += _test_rows(study, layer, trained["basis"], answers["test"])
    results = {
        "study": "das",
        "model": config.model,
        "prompt": study.prompt,
        "labels": study.labels,
        "rank": config.rank,
        "steps": config.steps,
        "answer_counts": {
            split: [int((label == i).sum()) for i in range(len(study.labels))]
            for split, label in answers.items()
        },
        "interchange": rows,
    }
    study.finish(
        results, lambda folder, content: page.write(folder, content, curves), seed=config.seed
    )
    print(f"finished: {workdir / 'index.html'}")


def _prepare(base: context.Context, questions: Mapping[str, list[tuple[Any, Any]]]) -> Study:
    """Return the study with its prompt, its answers and the features of its pictures."""
    pairs = [pair for split in questions.values() for pair in split]
    prompt, labels = pairs[0][1].prompt, sorted({question.answer for _, question in pairs})
    read = {
        split: features.vision_features(
            base.model, base.processor, [example for example, _ in pairs],
            base.workdir / "features" / f"{split}.npy", label=f"features, {split}",
        )
        for split, pairs in questions.items()
    }  # fmt: skip
    # Without the end of the turn, which depends on the answer and not on the exchanged state.
    ids = score.candidate_ids(base.processor, labels, 1, end=False)[0]
    same_question = [(example, pairs[0][1]) for example, _ in pairs]
    length = batching.row_length(base.processor, same_question)
    sizes = {
        split: features.picture_sizes(base.model.config, [example for example, _ in pairs])
        for split, pairs in questions.items()
    }
    return Study(
        **vars(base), prompt=prompt, labels=labels, ids=ids, length=length, features=read,
        sizes=sizes,
    )  # fmt: skip


def answer(study: Study, split: str) -> dict[str, np.ndarray]:
    """Return `label`, int[N]: the index of the answer that the model gives to each picture."""
    size, count = 2 * study.config.batch_size, len(study.features[split])
    parts = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        batch = study.batch(split, rows)
        parts.append(mesh.to_numpy(study.scores(study.model, batch, Edits(), size)).argmax(-1))
    return {"label": np.concatenate(parts)[:count]}


def pairs(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return int[count, 2]: the base picture of each pair, and a source with another answer."""
    if len(set(labels.tolist())) < 2:
        raise ValueError("the model gives all pictures the same answer: nothing to interchange")
    rng = np.random.default_rng(seed)
    base = rng.integers(len(labels), size=count)
    source = [rng.choice(np.flatnonzero(labels != labels[row])) for row in base]
    return np.stack([base, source], -1)


def _interchange(study: Study, layer: int, basis) -> Edits:
    """Return the edit that patches the second half of the rows into the first half."""
    half = np.arange(study.config.batch_size)
    return mj.patch(S.lm.resid_post[layer], half + len(half), half, where=tok.last, basis=basis)


def _check_subspaces(config: ml_collections.ConfigDict, lm: DecoderConfig) -> None:
    """Refuse layers that the model does not have, and subspaces wider than its states."""
    if not config.layers:
        raise ValueError("config.layers is empty: name the layers whose subspaces are trained")
    for layer in config.layers:
        if layer not in range(lm.layers):
            raise ValueError(
                f"config.layers: {layer} is not a layer of the model, 0 to {lm.layers - 1}"
            )
    if config.rank > lm.width:
        raise ValueError(f"config.rank={config.rank}: the model's states have width {lm.width}")


def train(study: Study, layer: int, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Train the subspace of a layer.

    Returns:
      `basis`, float32[D, r], orthonormal; `curve`, the loss of each step.
    """
    config, size = study.config, study.config.batch_size
    chosen = pairs(labels, config.steps * size, config.seed).reshape(-1, size, 2)

    class Batches:
        """Batches of pairs and the labels of their sources, made on access."""

        def __len__(self):
            return len(chosen)

        def __getitem__(self, step):
            return study.batch("train", chosen[step].T.ravel()), labels[chosen[step][:, 1]]

    def loss(basis, model, read, key):
        batch, wanted = read
        scores = study.scores(model, batch, _interchange(study, layer, basis), size)
        return optax.softmax_cross_entropy_with_integer_labels(scores, wanted).mean()

    width = study.model.config.lm.width
    start = np.random.default_rng(config.seed).normal(size=(width, config.rank))
    basis, curve = training.learn(
        loss, start.astype(np.float32), study.model, Batches(), optax.adam(config.rate),
        label=f"subspace of layer {layer}",
    )  # fmt: skip
    return {"basis": np.linalg.qr(np.asarray(basis))[0], "curve": curve}


def _test_rows(
    study: Study, layer: int, basis: np.ndarray, labels: np.ndarray
) -> list[dict[str, Any]]:
    """Return the interchange accuracy of the trained, the full and random subspaces."""
    random = {
        f"random{seed}": np.random.default_rng(seed).normal(size=basis.shape)
        for seed in range(study.config.controls)
    }
    rows = []
    for kind, tested in ({"learned": basis, "whole": None} | random).items():
        right = study.workdir.arrays(
            f"test-{layer}-{kind}", functools.partial(measure, study, layer, tested, labels)
        )["right"]
        value, low, high = map(float, intervals.mean(right))
        rows.append({"layer": layer, "subspace": kind, "accuracy": value, "low": low,
                     "high": high, "pairs": len(right)})  # fmt: skip
    return rows


def measure(
    study: Study, layer: int, basis: np.ndarray | None, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Return `right`: whether each base picture of the test pairs gets its source's answer."""
    size = study.config.batch_size
    count = -(-study.config.test_pairs // size) * size
    parts = []
    for chosen in pairs(labels, count, study.config.seed).reshape(-1, size, 2):
        batch = study.batch("test", chosen.T.ravel())
        scores = study.scores(study.model, batch, _interchange(study, layer, basis), size)
        parts.append(np.asarray(scores).argmax(-1) == labels[chosen[:, 1]])
    return {"right": np.concatenate(parts).astype(np.float32)}
