"""Find the words in texts to which image tokens are nearest (LatentLens, Krojer et al. 2026).

The texts are the answers to questions about training pictures, so that each has a domain. If the
states of image tokens represent what the picture shows, their nearest words belong to its domain
more often than by chance.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import mllm_jax as mj
from experiments.lens.context import Arrays, Study
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import contextual_words, intervals
from mllm_jax.typing import Float, Int

SHOWN = 5  # words that are listed for a domain and layer


class Bank(NamedTuple):
    """The states of the words of texts at all layers of the study, concatenated.

    Attributes:
      states: float32[m, D].
      text: int[m], the index of each word's text.
      word: int[m], its token id.
      layer: int[m], the layer of its state.
    """

    states: Float[np.ndarray, "m D"]
    text: Int[np.ndarray, " m"]
    word: Int[np.ndarray, " m"]
    layer: Int[np.ndarray, " m"]


def texts(pairs: Sequence[Any], styles: Sequence[str]) -> list[tuple[str, str]]:
    """Return the different answers of examples, each with its domain.

    Args:
      pairs: Examples with a question each.
      styles: The styles of the questions whose answers are texts.
    """
    every = [
        (example.domain, question.answer)
        for example, _ in pairs
        for question in example.questions
        if question.style in styles
    ]
    return list(dict.fromkeys(every))


def read_bank(study: Study, named: Sequence[tuple[str, str]]) -> Bank:
    """Read the states of the words of texts."""

    def make() -> Arrays:
        batch = study.processor(None, [text for _, text in named])
        kept = {"x": mj.keep(S.lm.resid_post[study.layers], where=tok.question)}
        out = mj.run(study.model, batch, study.edits, kept, logits="none")
        states = np.asarray(out["x"], np.float32)  # [L, B, T, D]
        at = np.asarray(tok.question.mask(batch.tokens))[: len(named)]
        layer, text, token = np.nonzero(np.broadcast_to(at, (len(states), *at.shape)))
        return Bank(
            states[layer, text, token], text, np.asarray(batch.ids)[text, token],
            np.asarray(study.layers)[layer],
        )._asdict()  # fmt: skip

    return Bank(**study.workdir.arrays("bank", make))


def measure(
    study: Study, named: Sequence[tuple[str, str]], domains: Sequence[str]
) -> list[dict[str, Any]]:
    """Compare the domain of each image token's nearest word with that of its picture.

    Args:
      study: The study.
      named: The texts with their domains.
      domains: The domain of each test picture.

    Returns:
      A row for each domain and layer: `value`, the share of image tokens whose nearest word is in
      a text of their picture's domain, with its interval over pictures, `low` and `high`;
      `chance`, the share of words in texts of that domain; `cosine`, the mean; `from_layer`,
      the mean layer of the nearest words; `words`, the most frequent ones with their shares.
    """
    bank = read_bank(study, named)

    def read(number: int) -> Arrays:
        found = study.states("test", number)
        image = found["kind"] == 0
        states = found["states"][image]  # [n, L, D]
        flat = states.reshape(-1, states.shape[-1])
        near = contextual_words.nearest(flat, bank.states, k=1)
        shape = states.shape[:2]
        return {
            "row": found["row"][image], "nearest": near.words[:, 0].reshape(shape),
            "cosine": near.cosine[:, 0].reshape(shape),
        }  # fmt: skip

    parts: list[Arrays] = []
    first = 0
    for number in study.numbers("test", "nearest words"):
        part = study.workdir.arrays(f"nearest/{number}", functools.partial(read, number))
        parts.append({**part, "row": part["row"] + first})
        first += len(study.questions["test"].rows(number))
    every = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    every["domain"] = np.array(domains)[every["row"]]
    of_word = np.array([domain for domain, _ in named])[bank.text]
    return [
        {"domain": name, "layer": layer, **_row(study, name, i, bank, of_word, every)}
        for name in dict.fromkeys(domains)
        for i, layer in enumerate(study.layers)
    ]


def _row(
    study: Study,
    name: str,
    place: int,
    bank: Bank,
    of_word: np.ndarray,
    every: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the row of `measure` for a domain and a layer.

    Args:
      study: The study.
      name: The domain.
      place: The index of the layer among those of the study.
      bank: The words.
      of_word: str[m], the domain of the text of each word.
      every: `row`, `domain`, `nearest` and `cosine` of all image tokens.
    """
    chosen = every["domain"] == name
    words = every["nearest"][chosen, place]
    rows, own = every["row"][chosen], of_word[words] == name
    count = np.bincount(rows)
    pictures = count > 0
    share = intervals.ratio(np.bincount(rows, own)[pictures], count[pictures])
    frequent = Counter(study.processor.word(int(i)) for i in bank.word[words]).most_common(SHOWN)
    return {
        "pictures": int(pictures.sum()),
        "value": float(share.value), "low": float(share.low), "high": float(share.high),
        "chance": float((of_word == name).mean()),
        "cosine": float(every["cosine"][chosen, place].mean()),
        "from_layer": float(bank.layer[words].mean()),
        "words": [[word, times / len(words)] for word, times in frequent],
    }  # fmt: skip
