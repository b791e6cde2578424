"""The steps of the dictionary study; see `experiments/dictionary/__main__.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import context, examples
from experiments.dictionary import latents, page
from experiments.dictionary.context import KINDS, Study, chunks
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax.analysis import fidelity
from mllm_jax.arguments import require_whole
from mllm_jax.data import batching
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes.collect import Collection, VectorSource
from mllm_jax.training import dictionaries as training
from mllm_jax.training.batches import VectorBatches

SHARD_BYTES = 2**23  # small, so that a killed run repeats little work


def run(
    config: ml_collections.ConfigDict, workdir: store.Workdir, edits: Edits | None = None
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_dictionary.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
    """
    context.require_choice("config.tokens", config.tokens, KINDS)
    site = S.get(config.site)
    if not (site.module == "lm" and site.stacked and site.has_latents):
        raise ValueError(
            f"config.site={config.site}: this study reads a site of the language model, such as "
            "lm.resid_post or lm.mlp.out"
        )
    require_whole("config.shown", config.shown)
    recipe = training.Recipe(**config.recipe, seed=config.seed)
    model, processor = mj.load(config.model)
    pairs = {
        split: batching.ask(examples.examples_of(config, split, count), config.styles)
        for split, count in (("train", config.train_per_domain), ("test", config.test_per_domain))
    }
    base = context.Context(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits()
    )
    base.claim({split: context.content(own) for split, own in pairs.items()})
    length = batching.row_length(processor, [*pairs["train"], *pairs["test"]])
    study = Study(**vars(base), pairs=pairs, length=length)
    source = collect(study, "train", (config.tokens,))[config.tokens]
    arrays: dict[str, Any] = workdir.arrays("dictionary", lambda: train(study, source, recipe))
    curves = {name: arrays.pop(name) for name in ("unexplained", "active", "dead")}
    mj.write_dictionary(Dictionary(**arrays, k=recipe.exact_k), workdir / "dictionary")
    dictionary = mj.load_dictionary(workdir / "dictionary")
    held_out = collect(study, "test", tuple(KINDS))
    results = {
        "study": "dictionary",
        "model": config.model,
        "site": config.site,
        "layer": config.layer,
        "tokens": config.tokens,
        "kind": recipe.kind,
        "latents": recipe.latents,
        "k": recipe.k,
        "width": dictionary.widths[0],
        "steps": config.steps,
        "vectors": {"train": len(source), **{k: len(of) for k, of in held_out.items()}},
        "questions": len(pairs["test"]),
        "fidelity": {kind: _fidelity(study, dictionary, held_out[kind], kind) for kind in KINDS},
        "losses": {kind: _losses(study, dictionary, held_out[kind], kind) for kind in KINDS},
        "strongest": latents.strongest(study, dictionary, source),
    }
    study.finish(
        results, lambda folder, content: page.write(folder, content, curves), seed=config.seed
    )
    print(f"finished: {workdir / 'index.html'}")


def collect(study: Study, split: str, kinds: Sequence[str]) -> Collection:
    """Return the activations of a split, by the kind of their tokens."""
    captures = {kind: mj.keep(study.target, where=KINDS[kind]) for kind in kinds}
    return mj.collect(
        captures, study.model, study.questions(split), study.workdir / f"activations/{split}",
        study.edits, shard_bytes=SHARD_BYTES, label=f"activations, {split}",
    )  # fmt: skip


def train(study: Study, source: VectorSource, recipe: training.Recipe) -> dict[str, np.ndarray]:
    """Return the arrays of the trained dictionary, and the curves of its training."""
    config = study.config
    batches = VectorBatches(source, config.vectors, config.steps, config.seed)
    fitted = training.fit(batches, recipe, save=study.workdir / "checkpoints/dictionary")
    named = fitted._asdict()
    dictionary = named.pop("dictionary")
    fields = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "input_bias")
    return {name: getattr(dictionary, name) for name in fields} | named


def _fidelity(
    study: Study, dictionary: Dictionary, source: VectorSource, kind: str
) -> dict[str, float | None]:
    """Return the fidelity of the dictionary on the held-out tokens of a kind."""

    def make() -> dict[str, float | None]:
        measured = fidelity.measure(dictionary, chunks(source))
        return {
            "explained": _finite(measured.explained),
            "active": measured.active_per_token,
            "dead": measured.dead,
        }

    return study.workdir.json(f"fidelity-{kind}", make)


def _losses(
    study: Study, dictionary: Dictionary, source: VectorSource, kind: str
) -> dict[str, Any]:
    """Return the mean loss of the right answer for each replacement at the tokens of a kind."""
    where = KINDS[kind]
    mean = source[:].value.mean(0, dtype=np.float64).astype(np.float32)
    instead = {
        "clean": Edits(),
        "zero": mj.ablate(study.target, where=where),
        "mean": mj.replace(study.target, mean, where=where),
        "spliced": mj.splice(study.target, dictionary, error=False, where=where),
    }
    losses = {
        name: study.workdir.arrays(
            "losses/clean" if name == "clean" else f"losses/{kind}-{name}",
            functools.partial(answer_losses, study, edits),
        )["loss"]
        for name, edits in instead.items()
    }
    recovered = {
        name: fidelity.loss_recovered(losses["clean"], losses[name], losses["spliced"])
        for name in ("zero", "mean")
    }
    return {
        "mean_loss": {name: float(values.mean()) for name, values in losses.items()},
        "recovered": {
            name: {key: _finite(value) for key, value in interval._asdict().items()}
            for name, interval in recovered.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def answer_losses(study: Study, edits: Edits) -> dict[str, np.ndarray]:
    """Return `loss`, float32[N], of the right answer to each held-out question, in nats."""
    questions, parts = study.questions("test"), []
    for number, batch in enumerate(study.test_batches):
        answers = [(question.answer,) for _, question in questions.rows(number)]
        scores = mj.score(study.model, batch, answers, study.edits >> edits)
        parts.append(-np.asarray(scores)[: len(answers), 0])
    return {"loss": np.concatenate(parts)}
