"""What the layers do: the logit lens, its stages, the pictures' features, words on a picture."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import tqdm

import mllm_jax as mj
from experiments.neurons.base import Study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import components, domain_neurons, logit_lens, stages
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.data import batching
from mllm_jax.data import features as features_

KINDS = ("image", "question")
DOMAINS = 5  # as in the paper; from fewer, nothing is said of the curve of numbers of neurons
FEATURES = {"vision": S.vision.resid_post[-1], "projector": S.projector.out}


def read(this: Study) -> dict[str, dict[str, np.ndarray]]:
    """By domain and picture: entropies of the lens [n, L, kinds], and features [n, width]."""
    captures = {"lens": mj.lens(S.lm.resid_post, by=KINDS)} | {
        name: mj.mean(site, where=tok.image) for name, site in FEATURES.items()
    }

    def one(asked: batching.QuestionBatches, number: int) -> dict[str, np.ndarray]:
        """Of each picture of a batch, which a bootstrap draws from."""
        batch, rows = asked[number], len(asked.rows(number))
        out = mj.run(this.model, batch, this.edits, captures, logits="none")
        lens = out["lens"]
        kinds = [lens.kinds.index(kind) for kind in KINDS]
        sums, tokens = (
            np.moveaxis(np.asarray(array), 0, 1)[:rows][..., kinds]
            for array in (lens.sum, np.broadcast_to(lens.tokens, lens.sum.shape))
        )
        config = this.model.config
        means = {
            name: features_.mean_over_tiles(config, batch, out[name])[:rows] for name in FEATURES
        }
        return {"sums": sums, "tokens": tokens[:, 0], **means}

    def make(name: str) -> dict[str, np.ndarray]:
        asked = this.asked("lens", name)
        parts = [
            this.workdir.arrays(f"lens/{name}-{i}", functools.partial(one, asked, i))
            for i in tqdm.trange(len(asked), desc=f"lens, {name}", leave=False)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return {
        name: this.workdir.arrays(f"lens-{name}", functools.partial(make, name))
        for name in this.names
    }


def curves(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Mean entropy by domain, kind and layer, with its interval over pictures."""
    return {name: _curves(arrays["sums"], arrays["tokens"]) for name, arrays in found.items()}


def _curves(sums: np.ndarray, tokens: np.ndarray) -> dict[str, dict[str, list[float]]]:
    curve = logit_lens.entropy_curve(sums, tokens)
    names = {"mean": curve.value, "low": curve.low, "high": curve.high}
    return {
        kind: {name: values[:, k].tolist() for name, values in names.items()}
        for k, kind in enumerate(KINDS)
    }


def staged(
    found: Mapping[str, Mapping[str, np.ndarray]], neurons: SelectedNeurons
) -> dict[str, Any]:
    """Stages of the curve of image tokens, by domain and of all; of text; of the neurons' curve.

    Args:
        neurons: of the language model.
    """
    every = {key: np.concatenate([a[key] for a in found.values()]) for key in ("sums", "tokens")}
    counts = domain_neurons.per_layer(neurons)
    image, text = (
        stages.find(every["sums"][..., k], every["tokens"][..., k]) for k in range(len(KINDS))
    )
    by_count = stages.find(counts, np.ones(len(counts)), fewest=DOMAINS)
    by_domain = {
        name: stages.find(arrays["sums"][..., 0], arrays["tokens"][..., 0])
        for name, arrays in found.items()
    }
    return {
        "rule": stages.RULE,
        "by_domain": {name: _plain(curve) for name, curve in by_domain.items()},
        "all": _plain(image),
        "text": _plain(text),
        "neurons": _plain(by_count),
        "agreement": stages.agreement(image, by_count),
    }


def _plain(found: stages.Stages) -> dict[str, Any]:
    bends = stages.bends(found.curve)
    pairs = {name: getattr(found, name) for name in ("boundaries", "low", "high")}
    return {
        **{name: None if pair is None else list(pair) for name, pair in pairs.items()},
        "verdict": found.verdict,
        "bends": bends,
        "confirmed": stages.confirmed(found, bends),
    }


def features(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Principal components of the pictures' features, by module and domain."""
    domain = np.repeat(np.arange(len(found)), [len(arrays["sums"]) for arrays in found.values()])
    results = {}
    for name in FEATURES:
        values = np.concatenate([arrays[name] for arrays in found.values()])
        fitted = components.principal(values)
        results[name] = {
            "points": {
                of: fitted.scores[domain == d].tolist() for d, of in enumerate(found)
            },
            "share": fitted.share.tolist(),
            "between": components.between(values, domain),
        }  # fmt: skip
    return results


def picture(this: Study, number: int, name: str) -> dict[str, Any] | None:
    """The first picture of a domain: what each image token says through the lens, by layer.

    The grid is the whole picture as the vision tower sees it: of LLaVA-NeXT the base tile. Its
    parts, where it has some, are a finer grid of the picture as it is. None where image tokens are
    on no grid (InstructBLIP's queries).
    """
    example = this.lens[name][0]

    def make():
        question = this.asked("lens", name).pairs[0][1]
        batch = this.processor([example.image], [question.prompt])
        whole, parts = grids(batch.tokens)
        if not whole.size:
            return None
        layers = np.linspace(0, this.model.config.lm.layers - 1, this.config.picture_layers)
        layers = [int(layer) for layer in layers.round()]
        capture = mj.lens(S.lm.resid_post[layers], k=1, where=tok.image)
        out = mj.run(this.model, batch, this.edits, {"lens": capture}, logits="none")["lens"]
        ids, entropy = (np.asarray(a)[:, 0] for a in (out.ids[..., 0], out.entropy))
        said = mj.generate(this.model, batch, this.edits, max_new_tokens=12, stop=True).text[0]

        def seen(at: np.ndarray) -> dict[str, list]:
            words = [[[this.processor.word(i) for i in row] for row in layer[at]] for layer in ids]
            return {"words": words, "entropy": entropy[:, at].astype(float).tolist()}

        return {
            "domain": name,
            "id": example.id,
            "question": question.prompt,
            "answer": question.answer,
            "generated": said,
            "layers": layers,
            **seen(whole),
            "parts": seen(parts) if parts.size else None,
        }

    shown = this.workdir.json(f"picture-{name}", make)
    if shown is None:
        return None
    image = store.save_figure(this.workdir, f"picture-{number}.png", example.image)
    batch = this.processor([example.image], ["<image>"])
    tower = store.save_figure(this.workdir, f"seen-{number}.png", as_seen(this.processor, batch))
    return shown | {"image": tower, "original": image}


def grids(tokens: tok.TokenMap) -> tuple[np.ndarray, np.ndarray]:
    """Where the image tokens of the first row of a batch stand: of the whole picture, of its parts.

    Returns:
        int[rows, columns] each; of no size where there is no such grid.
    """
    seen, line = np.asarray(tokens.kind[0]), np.asarray(tokens.row[0])
    image = (seen == tok.CODE["image"]) & (line >= 0)
    whole = np.flatnonzero(image & (np.asarray(tokens.tile[0]) == 0))
    parts = np.flatnonzero(image & (np.asarray(tokens.tile[0]) > 0))
    lines = int((seen == tok.CODE["newline"]).sum())  # one ends each row of the parts
    side = round(len(whole) ** 0.5)
    return whole.reshape(side, -1) if side else whole, parts.reshape(max(lines, 1), -1)


def as_seen(processor, batch):
    """The first tile of a batch as a picture: what the vision tower is given."""
    made = processor.image_processor
    pixels = batch.pixels[0] * np.asarray(made.image_std) + np.asarray(made.image_mean)
    return PIL.Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def pictures(this: Study) -> list[dict[str, Any]]:
    """One of each domain, where image tokens are on a grid."""
    found = [picture(this, number, name) for number, name in enumerate(this.names)]
    return [shown for shown in found if shown]
