"""Read the logit lens at each image token of one picture per domain."""

from __future__ import annotations

from typing import Any

import numpy as np

import mllm_jax as mj
from experiments.domain_neurons.context import Study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok


def pictures(study: Study) -> list[dict[str, Any]]:
    """Return the entries of all domains whose image tokens lie on a grid, see `picture`."""
    entries = [picture(study, number, name) for number, name in enumerate(study.names)]
    return [entry for entry in entries if entry]


def picture(study: Study, number: int, name: str) -> dict[str, Any] | None:
    """Return the most likely word and the entropy at each image token of a domain's first picture.

    The grid is that of the full picture as the vision tower sees it (of a picture that is cut into
    tiles, the tile that shows all of it). If the picture is also split into parts, their grid is in
    `parts`.

    Args:
        study: the study.
        number: the index of the domain, for the names of the files.
        name: the name of the domain.

    Returns:
        The entry of results.json; None where image tokens lie on no grid (InstructBLIP's queries).
    """
    example = study.lens[name][0]
    layout = study.processor.layout(example.image.size[::-1])

    def make() -> dict[str, Any] | None:
        question = study.questions("lens", name).pairs[0][1]
        batch = study.processor([example.image], [question.prompt])
        full, parts = layout.grids(batch.tokens)
        if not full.size:
            return None
        last = study.model.config.lm.layers - 1
        layers = [int(i) for i in np.linspace(0, last, study.config.picture_layers).round()]
        capture = mj.lens(S.lm.resid_post[layers], k=1, where=tok.image)
        out = mj.run(study.model, batch, study.edits, {"lens": capture}, logits="none")["lens"]
        ids, entropy = (np.asarray(a)[:, 0] for a in (out.ids[..., 0], out.entropy))
        generated = mj.generate(study.model, batch, study.edits, max_new_tokens=12, stop=True)
        assert generated.text is not None  # the batch has a processor

        def read_grid(at: np.ndarray) -> dict[str, list]:
            words = [[[study.processor.word(i) for i in row] for row in layer[at]] for layer in ids]
            return {"words": words, "entropy": entropy[:, at].astype(float).tolist()}

        return {
            "domain": name,
            "id": example.id,
            "question": question.prompt,
            "answer": question.answer,
            "generated": generated.text[0],
            "layers": layers,
            **read_grid(full),
            "parts": read_grid(parts) if parts.size else None,
        }

    entry = study.workdir.json(f"picture-{name}", make)
    if entry is None:
        return None
    original = store.save_figure(study.workdir, f"picture-{number}.png", example.image)
    batch = study.processor([example.image], ["<image>"])
    seen = study.processor.tile_picture(batch, layout.whole)
    return entry | {
        "image": store.save_figure(study.workdir, f"seen-{number}.png", seen),
        "original": original,
    }
