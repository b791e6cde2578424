"""The modules whose neurons the studies select, and the edits that ablate masks of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.interventions.edits import Edits

MODULES = {
    "vision": S.vision.mlp.act,
    "qformer": S.qformer.mlp.act,
    "query": S.qformer.query_mlp.act,
    "projector": S.projector.act,
    "lm": S.lm.mlp.act,
}


def in_order(by_module: Mapping[str, Any]) -> list[str]:
    """Return modules in the order of a pass."""
    return [module for module in MODULES if module in by_module]


def widest(modules: Sequence[str]) -> str:
    """Return the ablated module with the most neurons: all together, or else the last."""
    return "all" if "all" in modules else modules[-1]


def ablate_masks(masks: Mapping[str, np.ndarray]) -> Edits:
    """Return the edits that ablate the neurons of masks, bool[L, F] by module."""
    edits = (mj.ablate(MODULES[module][mask]) for module, mask in masks.items() if mask.any())
    return functools.reduce(operator.rshift, edits, Edits())
