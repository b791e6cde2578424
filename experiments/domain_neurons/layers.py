"""Follow tokens through the layers: the logit lens, its stages, and the features of pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

import mllm_jax as mj
from experiments.domain_neurons.context import Study
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import components, domain_neurons, logit_lens
from mllm_jax.analysis import stages as stages_
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.data import batching

KINDS = ("image", "question")
MIN_DOMAINS = 5  # MMNeuron's; with fewer, the curve of neuron counts gets no stages
FEATURES = {"vision": S.vision.resid_post[-1], "projector": S.projector.out}
LensArrays = Mapping[str, Mapping[str, np.ndarray]]  # {domain: {array: values}}, see `read`


def read(study: Study) -> dict[str, dict[str, np.ndarray]]:
    """Run the logit lens on the pictures of every domain.

    Returns:
        By domain, a row for each of N pictures: `sums` [N, L, kinds], the entropies summed over
        tokens; `tokens` [N, kinds], their number; and of FEATURES the mean over image tokens.
    """
    captures = {"lens": mj.lens(S.lm.resid_post, by=KINDS)} | {
        name: mj.mean(site, where=tok.image) for name, site in FEATURES.items()
    }

    def read_batch(questions: batching.QuestionBatches, number: int) -> dict[str, np.ndarray]:
        batch, rows = questions[number], len(questions.rows(number))
        out = mj.run(study.model, batch, study.edits, captures, logits="none")
        lens = out["lens"]
        kinds = [lens.kinds.index(kind) for kind in KINDS]
        sums, tokens = (
            np.moveaxis(np.asarray(array), 0, 1)[:rows][..., kinds]
            for array in (lens.sum, np.broadcast_to(lens.tokens, lens.sum.shape))
        )
        means = {name: np.asarray(out[name], np.float32)[:rows] for name in FEATURES}
        return {"sums": sums, "tokens": tokens[:, 0], **means}

    def read_domain(name: str) -> dict[str, np.ndarray]:
        questions = study.questions("lens", name)
        parts = [
            study.workdir.arrays(f"lens/{name}-{i}", functools.partial(read_batch, questions, i))
            for i in tqdm.trange(len(questions), desc=f"lens, {name}", leave=False)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return {
        name: study.workdir.arrays(f"lens-{name}", functools.partial(read_domain, name))
        for name in study.names
    }


def curves(lens: LensArrays) -> dict[str, Any]:
    """Return the mean entropy by domain, kind and layer, with its interval over pictures."""
    return {name: _curves(arrays["sums"], arrays["tokens"]) for name, arrays in lens.items()}


def _curves(sums: np.ndarray, tokens: np.ndarray) -> dict[str, dict[str, list[float]]]:
    curve = logit_lens.entropy_curve(sums, tokens)
    parts = {"mean": curve.value, "low": curve.low, "high": curve.high}
    return {
        kind: {part: values[:, k].tolist() for part, values in parts.items()}
        for k, kind in enumerate(KINDS)
    }


def staged(lens: LensArrays, neurons: SelectedNeurons) -> dict[str, Any]:
    """Return the stages of the entropy curves and of the curve of neuron counts.

    Args:
        lens: what `read` returns.
        neurons: the selected neurons of the language model.
    """
    pooled = {key: np.concatenate([a[key] for a in lens.values()]) for key in ("sums", "tokens")}
    counts = domain_neurons.per_layer(neurons)
    image, text = (
        stages_.find(pooled["sums"][..., k], pooled["tokens"][..., k]) for k in range(len(KINDS))
    )
    by_count = stages_.find(counts, np.ones(len(counts)), fewest=MIN_DOMAINS)
    by_domain = {
        name: stages_.find(arrays["sums"][..., 0], arrays["tokens"][..., 0])
        for name, arrays in lens.items()
    }
    return {
        "rule": stages_.RULE,
        "by_domain": {name: _plain(stages) for name, stages in by_domain.items()},
        "all": _plain(image),
        "text": _plain(text),
        "neurons": _plain(by_count),
        "agreement": stages_.agreement(image, by_count),
    }


def _plain(stages: stages_.Stages) -> dict[str, Any]:
    """Return the stages of a curve as JSON values."""
    bends = stages_.bends(stages.curve)
    pairs = {name: getattr(stages, name) for name in ("boundaries", "low", "high")}
    return {
        **{name: None if pair is None else list(pair) for name, pair in pairs.items()},
        "verdict": stages.verdict,
        "bends": bends,
        "confirmed": stages_.confirmed(stages, bends),
    }


def features(lens: LensArrays) -> dict[str, Any]:
    """Return the principal components of the pictures' features, by module and domain."""
    domain = np.repeat(np.arange(len(lens)), [len(arrays["sums"]) for arrays in lens.values()])
    results = {}
    for module in FEATURES:
        values = np.concatenate([arrays[module] for arrays in lens.values()])
        fitted = components.principal(values)
        results[module] = {
            "points": {
                name: fitted.scores[domain == d].tolist() for d, name in enumerate(lens)
            },
            "share": fitted.share.tolist(),
            "between": components.between(values, domain),
        }  # fmt: skip
    return results
