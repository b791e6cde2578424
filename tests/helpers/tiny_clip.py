"""A tiny random CLIP in the form of the hub: both towers, a tokenizer of letters, an image processor."""

from __future__ import annotations

import pathlib

import pytest
import tokenizers

SIDE = 24
POSITIONS = 48


def config(*, text: dict | None = None, **fields):
    """Of transformers; `text` and the fields change it."""
    transformers = pytest.importorskip("transformers")
    alphabet = letters()
    return transformers.CLIPConfig(
        text_config={
            "vocab_size": len(alphabet), "max_position_embeddings": POSITIONS, "hidden_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
            "bos_token_id": alphabet["<|startoftext|>"], "eos_token_id": alphabet["<|endoftext|>"],
            **(text or {}),
        },
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": SIDE, "patch_size": 6,
        },
        projection_dim=20,
        **fields,
    )  # fmt: skip


def letters() -> dict[str, int]:
    """The tokens: each letter within a word and at its end, then the marks."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {name: number for number, name in enumerate(names)}


def network(**how):
    """CLIPModel of torch with weights that keep its tensors of order 1; see `config`."""
    from tests.helpers import hf

    made = hf.random(hf.transformers.CLIPModel(config(**how)))
    made.logit_scale.data.fill_(2.0)
    return made


def write(directory: pathlib.Path, **how):
    """Writes the checkpoint; the network whose it is."""
    transformers = pytest.importorskip("transformers")
    made = network(**how)
    made.save_pretrained(directory)
    transformers.CLIPTokenizer(vocab=letters(), merges=[]).save_pretrained(directory)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(directory)
    return made
