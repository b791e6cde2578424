"""The strongest latents of a dictionary: their rates, strongest tokens and words."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.dictionary.context import Study, chunks
from mllm_jax import store
from mllm_jax.dictionaries.dictionary import Dictionary
from mllm_jax.passes.collect import Vectors, VectorSource
from mllm_jax.sharding import mesh
from mllm_jax.typing import Array, Float, Int

TOP = 6  # pictures of a latent
WORDS = 8  # words that its direction raises


def strongest(study: Study, dictionary: Dictionary, source: VectorSource) -> list[dict[str, Any]]:
    """Describe the latents with the most energy, and write the pictures of their tokens.

    Directions have norm 1, so that the energy of a latent, the sum of its squared values, is its
    share of the squared norm of the reconstructions.

    Args:
      study: The study. `shown` of its config is the number of latents.
      dictionary: The dictionary.
      source: The vectors of training.

    Returns:
      For each latent its index, share of energy, rate, mean when it is active, the share of its
      active tokens by domain, the words that its direction raises, and, for image tokens, the
      pictures on which it is strongest, with the position of the token.
    """

    def make() -> list[dict[str, Any]]:
        energy = _energy(dictionary, source)
        shares = energy / max(energy.sum(), 1e-30)
        chosen = np.argsort(-energy, kind="stable")[: study.config.shown]
        values = np.concatenate(
            [np.asarray(_encode(dictionary, some))[:, chosen] for some in chunks(source)]
        )
        places, words = source[:], _words(study, dictionary, chosen)
        return [
            {
                "latent": int(latent),
                "energy": float(shares[latent]),
                **_entry(study, values[:, n], places),
                "words": words[n],
            }
            for n, latent in enumerate(chosen)
        ]

    entries = study.workdir.json("strongest", make)
    for example, tile in sorted({(p["example"], p["tile"]) for e in entries for p in e["top"]}):
        picture, question = study.pairs["train"][example]
        batch = study.processor([picture.image], [question.prompt])
        shown = study.processor.tile_picture(batch, tile)
        store.save_figure(study.workdir, _name(example, tile), shown)
    return entries


@jax.jit
def _encode(dictionary: Dictionary, vectors: Float[Array, "n D"]) -> Float[Array, "n M"]:
    return dictionary.encode(vectors)


def _energy(dictionary: Dictionary, source: VectorSource) -> Float[np.ndarray, " M"]:
    """Return the sum of the squared values of each latent on the vectors of training, float64."""
    energy = np.zeros(dictionary.widths[1], np.float64)
    for some in chunks(source):
        energy += (np.asarray(_encode(dictionary, some), np.float64) ** 2).sum(0)
    return energy


def _entry(study: Study, values: Float[np.ndarray, " n"], places: Vectors) -> dict[str, Any]:
    """Return the rate and the strongest tokens of one latent, from its value at each token."""
    active = values > 0
    domain_of = np.array([example.domain for example, _ in study.pairs["train"]])
    domains = domain_of[places.example[active]]
    count = int(active.sum())
    return {
        "rate": float(count / len(values)),
        "mean": float(values[active].mean(dtype=np.float64)) if count else 0.0,
        "domains": {name: float((domains == name).sum() / max(count, 1))
                    for name in dict.fromkeys(domain_of.tolist())},
        "top": _top(values, places),
    }  # fmt: skip


def _top(values: Float[np.ndarray, " n"], places: Vectors) -> list[dict[str, Any]]:
    """Return the image tokens on which a latent is strongest, one per picture."""
    found: dict[int, dict[str, Any]] = {}
    for at in np.argsort(-values, kind="stable"):
        example, tile, row, column = (
            int(part[at]) for part in (places.example, places.tile, places.row, places.column)
        )
        if len(found) == TOP or values[at] <= 0:
            break
        if example in found or row < 0:
            continue
        own = (places.example == example) & (places.tile == tile)
        found[example] = {
            "image": f"figures/{_name(example, tile)}", "value": float(values[at]),
            "example": example, "tile": tile, "row": row, "column": column,
            "rows": int(places.row[own].max()) + 1, "columns": int(places.column[own].max()) + 1,
        }  # fmt: skip
    return list(found.values())


def _name(example: int, tile: int) -> str:
    return f"picture-{example}-{tile}.jpg"


def _words(study: Study, dictionary: Dictionary, chosen: Int[np.ndarray, " n"]) -> list[list[str]]:
    """Return the words that each direction raises most, through the head alone.

    They are empty for a site that is not in the residual stream.
    """
    if study.target.site.axes[-1] != "D":
        return [[] for _ in chosen]
    with mesh.use_mesh_of(study.model):
        logits = mesh.gather_to_host(
            _through_head(study.model.lm, np.asarray(dictionary.decoder)[chosen])
        )
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :WORDS]
    return [[study.processor.word(i) for i in ids] for ids in order]


@jax.jit
def _through_head(lm: Any, directions: Float[Array, "n D"]) -> Float[Array, "n V"]:
    return lm.lens(directions)
