"""Follow tokens through the layers: the logit lens, its stages, and the features of pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import context
from experiments.domain_neurons import effects
from experiments.domain_neurons.context import Study
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import components, domain_neurons, intervals, logit_lens, power
from mllm_jax.analysis import stages as stages_
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.data import batching
from mllm_jax.interventions.results import Distribution

KINDS = ("image", "question")
SITES = {
    "resid_mid": S.lm.resid_mid, "attn_out": S.lm.attn_out, "mlp.out": S.lm.mlp.out,
}  # fmt: skip
WORDS = 10  # of a mean distribution in results.json
MOST_LIKELY = 0.4  # "even the most probable token has less than 40 %" (Huo et al.'s blog post)
FEATURES = {"vision": S.vision.resid_post[-1], "projector": S.projector.out}
LensArrays = Mapping[str, Mapping[str, np.ndarray]]  # {domain: {array: values}}, see `read`


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse an unknown site of the lens, before anything is computed."""
    for site in config.lens_sites:
        context.require_choice("config.lens_sites", site, SITES)


def read(study: Study) -> dict[str, dict[str, np.ndarray]]:
    """Run the logit lens on the pictures of every domain.

    Returns:
      By domain, a row for each of N pictures: `sums` and `top` [N, L, kinds], the entropies and
      the probabilities of the most likely word, summed over tokens; `tokens` [N, kinds], their
      number; `SITE/sums` of the further sites of the config; and of FEATURES the mean over image
      tokens. A row for each batch: `words` [layers, kinds, V], the probabilities of all words
      after `Study.word_layers`, summed over tokens.
    """
    sites = study.config.lens_sites
    captures = {"lens": mj.lens(S.lm.resid_post, by=KINDS)}
    captures |= {site: mj.lens(SITES[site], by=KINDS) for site in sites}
    captures["words"] = mj.distribution(S.lm.resid_post[study.word_layers], by=KINDS)
    captures |= {name: mj.mean(site, where=tok.image) for name, site in FEATURES.items()}

    def read_batch(questions: batching.QuestionBatches, number: int) -> dict[str, np.ndarray]:
        batch, rows = questions[number], len(questions.rows(number))
        out = mj.run(study.model, batch, study.edits, captures, logits="none")
        lens = out["lens"]
        kinds = [lens.kinds.index(kind) for kind in KINDS]

        def by_picture(array: Any) -> np.ndarray:  # [L, B, kinds] -> [N, L, kinds]
            return np.moveaxis(np.asarray(array), 0, 1)[:rows][..., kinds]

        tokens = by_picture(np.broadcast_to(lens.tokens, lens.sum.shape))[:, 0]
        return {
            "sums": by_picture(lens.sum), "top": by_picture(lens.top), "tokens": tokens,
            "words": np.asarray(out["words"].sum)[None, :, kinds],
            **{f"{site}/sums": by_picture(out[site].sum) for site in sites},
            **{name: np.asarray(out[name], np.float32)[:rows] for name in FEATURES},
        }  # fmt: skip

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


def words(study: Study, lens: LensArrays) -> list[dict[str, Any]]:
    """Return the most probable words of mean distributions, a row by domain, kind and layer.

    Args:
      study: The study.
      lens: The result of `read`.
    """
    rows: list[dict[str, Any]] = []
    for name, arrays in lens.items():
        total, tokens = arrays["words"].sum(0, dtype=np.float64), arrays["tokens"].sum(0)
        ids, probabilities = Distribution(total, tokens, KINDS).top(WORDS)
        rows += [
            {"data": name, "tokens": kind, "layer": layer, "n": int(tokens[k]),
             "words": [study.processor.word(int(i)) for i in ids[place, k]],
             "probabilities": probabilities[place, k].tolist()}
            for k, kind in enumerate(KINDS)
            if tokens[k]
            for place, layer in enumerate(study.word_layers)
        ]  # fmt: skip
    return rows


def curves(lens: LensArrays, values: str = "sums") -> dict[str, Any]:
    """Return a mean by domain, kind and layer, with its interval over pictures.

    Args:
      lens: The result of `read`.
      values: The sums over tokens: `sums`, `top` or `SITE/sums`.
    """
    return {name: _curves(arrays[values], arrays["tokens"]) for name, arrays in lens.items()}


def sparsity(lens: LensArrays) -> list[dict[str, Any]]:
    """Test the paper's claims about the lens at the last layer, picture by picture.

    Returns:
      Two rows per domain. `entropy`: the entropy at image tokens minus that at question tokens,
      above zero according to the paper. `most likely word`: its probability at image tokens, below
      MOST_LIKELY according to the paper. `verdict` is "holds", "fails" or "undecided", by tests
      corrected for all domains (Holm).
    """
    rows: list[dict[str, Any]] = []
    for name, arrays in lens.items():
        entropy, top = (
            arrays[values][:, -1] / np.maximum(arrays["tokens"], 1) for values in ("sums", "top")
        )
        read = (arrays["tokens"] > 0).all(axis=1)  # pictures with tokens of both kinds
        image, text = entropy[read].T
        rows += [
            _tested(name, "entropy", image - text, 0.0, sign=1),
            _tested(name, "most likely word", top[read][:, 0], MOST_LIKELY, sign=-1),
        ]
    for measure in ("entropy", "most likely word"):
        family = [row for row in rows if row["measure"] == measure]
        effects.correct(family)
        for row in family:
            row["verdict"] = _verdict(row)
    return rows


def _tested(name: str, measure: str, values: np.ndarray, bound: float, sign: int) -> dict[str, Any]:
    """Return the mean of a value over pictures, tested against a bound."""
    mean = intervals.mean(values)
    return {
        "data": name, "measure": measure, "n": len(values), "bound": bound, "claimed": sign,
        "value": float(mean.value), "low": float(mean.low), "high": float(mean.high),
        "p": intervals.sign_flip(values - bound),
    }  # fmt: skip


def _verdict(row: Mapping[str, Any]) -> str:
    if row["p_holm"] > power.LEVEL:
        return "undecided"
    return "holds" if (row["value"] - row["bound"]) * row["claimed"] > 0 else "fails"


def _curves(sums: np.ndarray, tokens: np.ndarray) -> dict[str, dict[str, list[float]]]:
    curve = logit_lens.entropy_curve(sums, tokens)
    parts = {"mean": curve.value, "low": curve.low, "high": curve.high}
    return {
        kind: {part: values[:, k].tolist() for part, values in parts.items()}
        for k, kind in enumerate(KINDS)
    }


def staged(
    lens: LensArrays, neurons: SelectedNeurons, resampled: np.ndarray | None, groups: int
) -> dict[str, Any]:
    """Return the stages of the entropy curves and of the curve of neuron counts.

    Args:
      lens: The result of `read`.
      neurons: The selected neurons of the language model.
      resampled: int[R, D_, L], the numbers of neurons in resampled groups of pictures; None if the
        selection of `neurons` was not resampled.
      groups: The number of these groups.
    """
    pooled = {key: np.concatenate([a[key] for a in lens.values()]) for key in ("sums", "tokens")}
    counts = domain_neurons.per_layer(neurons).sum(axis=0)
    image, text = (
        stages_.find(pooled["sums"][..., k], pooled["tokens"][..., k]) for k in range(len(KINDS))
    )
    by_count = (
        stages_.undecided(counts, "the selection of the neurons was not resampled")
        if resampled is None
        else stages_.find_resampled(counts, resampled.sum(axis=1), groups)
    )
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
        "claimed": stages.claimed,
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
