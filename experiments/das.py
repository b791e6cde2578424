"""Where an answer is stored: subspaces by distributed alignment search (Geiger et al. 2024).

    python -m experiments.das --config=configs/embedded_das.py --workdir=DIR

All pictures are asked one question. At the last token of the prompt, within a low-rank subspace of
the residual, a picture's state is replaced by that of another picture that the model answers
differently; the subspace is learned so that the model gives the other picture's answer. How often
it does so on test pictures is the interchange accuracy; beside it stand random subspaces of the
same rank, and the whole residual.

Leaves in the workdir: `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`,
`manifest.json`, and `basis-LAYER.npy`, float32[D, r], a value:
`--edits='project_out lm.resid_post[12] @DIR/basis-12.npy'`. `--edits` change the model that is
studied, but for its vision tower.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.das", takes=("edits",), rows={"batch_size": 2})

import dataclasses
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
from mllm_jax import tokens as tok
from mllm_jax.analysis import intervals
from mllm_jax.data import batching, features
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score
from mllm_jax.report import learned as page
from mllm_jax.sharding import mesh
from mllm_jax.training import edits as learning


@dataclasses.dataclass(frozen=True)
class Study:
    """What every step reads.

    Attributes:
        prompt, labels: the question to all pictures, and its answers.
        ids: int32[C, A], the answers as tokens. length: of a row.
        seen: vision features of the pictures of each split.
    """

    config: Any
    model: Any
    processor: Any
    edits: Edits
    prompt: str
    labels: list[str]
    ids: np.ndarray
    length: int
    seen: dict[str, np.ndarray]

    def batch(self, split: str, rows: np.ndarray):
        """The question to some pictures of a split."""
        prompts = [self.prompt] * len(rows)
        batch = self.processor(
            None, prompts, features=np.asarray(self.seen[split][rows]), length=self.length
        )
        return batch.replace(processor=None)

    def scores(self, model, batch, edits: Edits, count: int) -> jax.Array:
        """float32[count, C]: log-likelihood of every answer in the first rows."""
        rows = jnp.arange(len(batch.ids)) < count
        ids = jnp.where(rows[:, None, None], self.ids, -1)
        return mj.score(model, batch, ids, self.edits >> edits)[:count]


def run(config, workdir: store.Workdir, edits: Edits | None = None) -> None:
    if any(edit.address.site.module == "vision" for edit in edits or ()):
        raise ValueError("this study reads each picture once: --edits of the vision tower are none")
    model, processor = mj.load(config.model)
    asked = {
        split: batching.ask(study.examples_of(config, split, count), (config.style,))
        for split, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    }
    study.claim(
        workdir,
        config,
        model,
        processor,
        {name: study.content(some) for name, some in asked.items()},
    )
    this = _study(config, workdir, model, processor, edits or Edits(), asked)
    answers = {
        split: workdir.arrays(f"answers-{split}", functools.partial(answer, this, split))["label"]
        for split in asked
    }
    bases, curves, rows = {}, {}, []
    for layer in config.layers:
        found = workdir.arrays(
            f"learned-{layer}", functools.partial(learn, this, layer, answers["train"])
        )
        bases[layer], curves[layer] = found["basis"], found["curve"]
        with store.atomic(workdir / f"basis-{layer}.npy") as file:
            np.save(file, found["basis"])
        others = {
            f"random{seed}": np.random.default_rng(seed).normal(size=found["basis"].shape)
            for seed in range(config.controls)
        }
        for kind, basis in ({"learned": found["basis"], "whole": None} | others).items():
            right = workdir.arrays(
                f"test-{layer}-{kind}",
                functools.partial(measure, this, layer, basis, answers["test"]),
            )["right"]
            value, low, high = map(float, intervals.mean(right))
            rows.append({"layer": layer, "subspace": kind, "accuracy": value, "low": low,
                         "high": high, "pairs": len(right)})  # fmt: skip
    results = {
        "study": "das",
        "model": config.model,
        "prompt": this.prompt,
        "labels": this.labels,
        "rank": config.rank,
        "steps": config.steps,
        "answered": {
            split: [int((label == i).sum()) for i in range(len(this.labels))]
            for split, label in answers.items()
        },
        "interchange": rows,
    } | study.named(workdir)
    store.atomic_json(workdir / "results.json", results)
    page.write_das(workdir.path, results, curves)
    store.write_manifest(workdir, seed=config.seed)
    print(f"finished: {workdir / 'index.html'}")


def _study(config, workdir, model, processor, edits: Edits, asked) -> Study:
    pairs = [pair for some in asked.values() for pair in some]
    prompt, labels = pairs[0][1].prompt, sorted({question.answer for _, question in pairs})
    seen = {
        split: features.vision_features(
            model, processor, [example for example, _ in some],
            workdir / "features" / f"{split}.npy", label=f"features, {split}",
        )
        for split, some in asked.items()
    }  # fmt: skip
    # Without the end of the turn: it is said of the answer, not of what is exchanged before it.
    ids = score.candidate_ids(processor, labels, 1, end=False)[0]
    length = batching.row_length(processor, pairs[:1])
    return Study(config, model, processor, edits, prompt, labels, ids, length, seen)


def answer(this: Study, split: str) -> dict[str, np.ndarray]:
    """int[N]: which answer the model gives to each picture of a split."""
    size, count = 2 * this.config.batch_size, len(this.seen[split])
    found = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        batch = this.batch(split, rows)
        found.append(mesh.to_numpy(this.scores(this.model, batch, Edits(), size)).argmax(-1))
    return {"label": np.concatenate(found)[:count]}


def pairs(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int[count, 2]: pictures to be changed and pictures to be read, of different answers."""
    if len(set(labels.tolist())) < 2:
        raise ValueError("the model gives all pictures one answer: there is nothing to interchange")
    rng = np.random.default_rng(seed)
    base = rng.integers(len(labels), size=count)
    source = [rng.choice(np.flatnonzero(labels != labels[row])) for row in base]
    return np.stack([base, source], -1)


def _interchange(this: Study, layer: int, basis) -> Edits:
    """The first half of the rows reads the second."""
    half = np.arange(this.config.batch_size)
    return mj.patch(S.lm.resid_post[layer], half + len(half), half, where=tok.last, basis=basis)


def learn(this: Study, layer: int, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The subspace float32[D, r] that was learned, orthonormal, and the loss of each step."""
    config, size = this.config, this.config.batch_size
    chosen = pairs(labels, config.steps * size, config.seed).reshape(-1, size, 2)

    class Batches:
        """Made when they are asked for."""

        def __len__(self):
            return len(chosen)

        def __getitem__(self, step):
            return this.batch("train", chosen[step].T.ravel()), labels[chosen[step][:, 1]]

    def loss(basis, model, read, key):
        batch, wanted = read
        scores = this.scores(model, batch, _interchange(this, layer, basis), size)
        return optax.softmax_cross_entropy_with_integer_labels(scores, wanted).mean()

    width = this.model.config.lm.width
    start = np.random.default_rng(config.seed).normal(size=(width, config.rank))
    basis, curve = learning.learn(
        loss, start.astype(np.float32), this.model, Batches(), optax.adam(config.rate),
        label=f"subspace of layer {layer}",
    )  # fmt: skip
    return {"basis": np.linalg.qr(np.asarray(basis))[0], "curve": curve}


def measure(this: Study, layer: int, basis, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each changed picture of the test pairs is given the answer of the one it reads."""
    size = this.config.batch_size
    count = -(-this.config.test_pairs // size) * size
    found = []
    for some in pairs(labels, count, this.config.seed).reshape(-1, size, 2):
        batch = this.batch("test", some.T.ravel())
        scores = this.scores(this.model, batch, _interchange(this, layer, basis), size)
        found.append(np.asarray(scores).argmax(-1) == labels[some[:, 1]])
    return {"right": np.concatenate(found).astype(np.float32)}
