"""Read the logit lens at each image token of one picture per domain."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import mllm_jax as mj
from experiments.domain_neurons.context import Study, spaced
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import picture_attribution
from mllm_jax.batch import Batch
from mllm_jax.passes.run import Out

WORDS = 5  # of the lens at each patch
MOST_LAYERS = 40  # of the slider


def pictures(study: Study) -> list[dict[str, Any]]:
    """Return the entries of all domains whose image tokens are on a grid, see `picture`."""
    entries = [picture(study, number, name) for number, name in enumerate(study.names)]
    return [entry for entry in entries if entry]


def picture(study: Study, number: int, name: str) -> dict[str, Any] | None:
    """Return the most likely word and the entropy at each image token of a domain's first picture.

    The grid is that of the full picture as the vision tower sees it (of a picture that is cut into
    tiles, the tile that shows all of it). If the picture is also split into parts, their grid is in
    `parts`.

    Args:
      study: The study.
      number: The index of the domain, for the names of the files.
      name: The name of the domain.

    Returns:
      The entry of results.json; None if image tokens are not on a grid (InstructBLIP's queries).
    """
    example = study.lens[name][0]
    layout = study.processor.layout(example.image.size[::-1])

    def make() -> dict[str, Any] | None:
        question = study.questions("lens", name).pairs[0][1]
        batch = study.processor([example.image], [question.prompt])
        full, parts = layout.grids(batch.tokens)
        if not full.size:
            return None
        every = spaced(study.model.config.lm.layers, MOST_LAYERS)
        captures = {
            "lens": mj.lens(S.lm.resid_post[every], k=WORDS, where=tok.image),
            "attention": mj.attention(S.lm.attn.pattern[every], where=tok.last),
        }
        out = mj.run(study.model, batch, study.edits, captures, logits="none")
        read, attention = out["lens"], np.asarray(out["attention"])[:, 0].mean(1)
        best, entropy = (np.asarray(a)[:, 0] for a in (read.ids, read.entropy))
        drawn = spaced(len(every), study.config.picture_layers)
        generated = mj.generate(study.model, batch, study.edits, max_new_tokens=12, stop=True)
        assert generated.text is not None  # the batch has a processor

        def read_grid(at: np.ndarray) -> dict[str, list]:
            ids = best[drawn, ..., 0]
            words = [[[study.processor.word(i) for i in row] for row in layer[at]] for layer in ids]
            return {"words": words, "entropy": entropy[drawn][:, at].astype(float).tolist()}

        return {
            "domain": name,
            "id": example.id,
            "question": question.prompt,
            "answer": question.answer,
            "generated": generated.text[0],
            "layers": [every[i] for i in drawn],
            **read_grid(full),
            "parts": read_grid(parts) if parts.size else None,
            "by_layer": {
                "layers": every,
                **_vocabulary(study, best[:, full.reshape(-1)]),
                "entropy": entropy[:, full.reshape(-1)].astype(float).tolist(),
                "attention": attention[:, full.reshape(-1)].astype(float).tolist(),
                "attribution": _attribution(
                    study, batch, int(generated.tokens[0, 0]), layout.whole
                ),
            },
        }

    entry = study.workdir.json(f"picture-{name}", make)
    if entry is None:
        return None
    original = store.save_figure(study.workdir, f"picture-{number}.png", example.image)
    batch = study.processor([example.image], ["<image>"])
    seen = study.processor.tile_picture(batch, layout.whole)
    if seen.tobytes() != example.image.convert("RGB").tobytes():
        return entry | {
            "image": store.save_figure(study.workdir, f"seen-{number}.png", seen),
            "original": original,
        }
    return entry | {"image": original, "original": original}


def _attribution(study: Study, batch: Batch, token: int, tile: int) -> list[list[float]] | None:
    """Return gradient x input of the first generated token by patch of a tile, [1][P].

    It is None if the config requests no effects, which need a backward pass.
    """
    if not study.config.evidence_effects:
        return None
    metric = jax.tree_util.Partial(_logit, token=token)
    gated = picture_attribution.GatedPicture.of(metric, study.model, batch, study.edits)
    values = picture_attribution.gradient_times_input(gated).maps(0)[tile]
    return [np.nan_to_num(values).reshape(-1).astype(float).tolist()]


def _logit(out: Out, token: int) -> jax.Array:
    assert out.logits is not None, "a gated picture requests the logits of the last token"
    return out.logits[:, token]


def _vocabulary(study: Study, ids: np.ndarray) -> dict[str, Any]:
    """Return the words of token ids, and the ids as indices of these words."""
    known, indices = np.unique(ids, return_inverse=True)
    vocabulary = [study.processor.word(i) for i in known]
    return {"vocabulary": vocabulary, "words": indices.reshape(ids.shape).tolist()}
