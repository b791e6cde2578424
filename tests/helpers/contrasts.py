"""Contrasts of tiny models: two pictures, and a model that is linear."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.analysis import corruption
from mllm_jax.analysis.contrasts import Contrast
from mllm_jax.families.llava import model as llava
from tests.helpers import random_inputs

LAYERS = 3


def difference(out, right, wrong):
    """A difference of logits: float[B]."""
    at = jnp.arange(len(out.logits))
    return out.logits[at, right] - out.logits[at, wrong]


METRIC = jax.tree_util.Partial(difference, right=np.array([3, 8]), wrong=np.array([7, 9]))


def tiny_config(**lm) -> llava.LlavaConfig:
    vision = dataclasses.replace(random_inputs.TINY.vision, layers=2)
    text = dataclasses.replace(random_inputs.TINY.lm, layers=LAYERS, **lm)
    return llava.LlavaConfig.of(vision, text, fold=2, image_token=95)


def contrast(model: llava.Llava, scale: float = 3.0) -> Contrast:
    """Two rows, padded on the left, one of them with a picture, against noisy pictures."""
    clean = random_inputs.make_batch(model.config, images=(1, 1), words=(5, 8), pad="left")
    return Contrast.of(METRIC, model, clean, corruption.noise(clean, scale=scale))


def linear_model() -> llava.Llava:
    """A model whose LM is linear in its embeddings.

    Its norms divide by a constant, its attention is uniform, and its MLPs add nothing.
    """
    model = random_inputs.random_model(tiny_config(eps=1e8))

    def change(path, leaf):
        name = jax.tree_util.keystr(path)
        if not name.startswith(".lm"):
            return leaf
        if "norm" in name:
            return leaf * 1e4
        return jnp.zeros_like(leaf) if any(part in name for part in (".q", ".down")) else leaf

    return jax.tree_util.tree_map_with_path(change, model)


def one_head_model(config: llava.LlavaConfig, layer: int, head: int) -> llava.Llava:
    """A model in which one head alone writes to the residual; no MLP and no other head does."""
    width = config.lm.head_width

    def change(path, leaf):
        name = jax.tree_util.keystr(path)
        if not name.startswith(".lm.layers") or not (".o." in name or ".down." in name):
            return leaf
        here = slice(head * width, (head + 1) * width)
        kept = jnp.zeros_like(leaf).at[layer, here].set(leaf[layer, here])
        return kept if ".o." in name else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(change, random_inputs.random_model(config))
