"""The sites of a model and their shapes, determined without computation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.tap import Taps
from mllm_jax.sites import LATENTS, Site, SiteShape


def site_shapes(model: Model, batch: Batch) -> dict[str, SiteShape]:
    """Return the sites of a pass of this batch with their shapes, by name."""
    leaves, structure = jax.tree.flatten((model, batch))
    return _site_shapes(structure, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves))


@functools.lru_cache(maxsize=64)
def _site_shapes(
    structure: Any, leaves: tuple[tuple[tuple[int, ...], np.dtype], ...]
) -> dict[str, SiteShape]:
    def forward(model: Model, batch: Batch):
        x, _ = model(batch, taps)
        return model.logits(x, taps)

    taps = Taps()
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves]
    jax.eval_shape(forward, *jax.tree.unflatten(structure, abstract))
    return taps.shapes


def look_up(site: Site, shapes: dict[str, SiteShape]) -> SiteShape:
    """Return the shape of a site.

    Raises:
      ValueError: The pass has no such site.
    """
    if site.name not in shapes:
        if site.is_latents:
            base = site.name.removesuffix(LATENTS)
            raise ValueError(
                f"no dictionary is spliced at {base}, so the pass has no {site}: chain "
                f"mj.splice({base}[layer], dictionary) with the edits"
            )
        raise ValueError(f"this pass has no site {site.name}; it has: {', '.join(shapes)}")
    return shapes[site.name]
