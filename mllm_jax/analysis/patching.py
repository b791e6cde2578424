"""Activation patching: which activations carry the difference between two inputs.

A contrast is a metric of two batches of one layout, clean and corrupt: the same questions about
other pictures, or other questions of equally many tokens about the same pictures. Patching sets a
part of the clean pass to its value in the corrupt pass; its effect is the decrease of the metric.

    contrast = Contrast.of(metric, model, clean, corrupt)      # metric: Out -> float[B]
    found = attribute(contrast, [S.lm.resid_post, S.lm.attn.heads, S.lm.mlp.act])
    found.values["lm.attn.heads"]                               # float32[L, B, T, N]
    exact(contrast, S.lm.attn.heads, over=("layer", "unit"))    # float32[L, B, 1, N], by a sweep

`attribute` estimates all effects at once, from two forward passes and one backward pass
(attribution patching: Nanda 2023; Syed et al. 2023). A part is a gate in the sense of
`attribution`: 1 is the clean value, 0 the corrupt one. With `steps` the gradients are averaged on
the line from the corrupt to the clean embeddings (integrated gradients: Hanna et al. 2024).

The latents of dictionaries are parts like neurons if the edits of the contrast include their
splices (Marks et al. 2024, "Sparse Feature Circuits"):

    spliced = Contrast.of(metric, model, clean, corrupt, mj.splice(S.lm.resid_post[14], sae))
    attribute(spliced, [S.lm.resid_post.latents])               # float32[1, B, T, M]
    exact(spliced, S.lm.resid_post.latents[14, strongest], over=("layer", "unit"))
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.analysis import attribution, checks
from mllm_jax.analysis.contrasts import (
    Contrast,
    input_sites,
    line_between,
    metric_of_clean_rows,
    with_layers,
)
from mllm_jax.batch import Batch
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.captures import keep
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.interventions.splices import LatentSite, latent_sites
from mllm_jax.numerics.precision import at_least_float32
from mllm_jax.sites import Address, Site, Target
from mllm_jax.tokens import Selector
from mllm_jax.typing import Array, Bool, Float

Axis = Literal["layer", "token", "unit"]
AXES = ("layer", "token", "unit")
WIDTHS = "DEWH"  # the axes along which a gate closes all at once


@dataclasses.dataclass(frozen=True)
class Effects:
    """The estimated effect of patching each part alone: the decrease of the metric.

    Attributes:
      values: By the name of the site: [L, B, T] for sites of the residual's width, [L, B, T, N] for
        heads, [L, B, T, F] for neurons, [L, I, P] and so on for vision sites, without L for sites
        that exist once; [splices, B, T, M] for latents, in the order of the splices.
      clean: The metric of each row of the clean batch, float32[B].
      corrupt: The metric of each row of the corrupt batch, float32[B].
    """

    values: dict[str, Float[np.ndarray, ...]]
    clean: Float[np.ndarray, " B"]
    corrupt: Float[np.ndarray, " B"]


def attribute(
    contrast: Contrast, sites: Sequence[Site], *, where: Selector = None, steps: int = 0
) -> Effects:
    """Estimate the effect of patching each layer, token and unit of some sites, all at once.

    Besides the passes it takes about ten times the memory of the values, whatever `where` selects:
    for many latents, limit the rows of the batches or the splices of the contrast.

    Args:
      contrast: The contrast.
      sites: The sites; latents of the splices among the edits of the contrast.
      where: The tokens that are patched; all by default.
      steps: 0 for the gradient at the clean activations; or the number of points from the corrupt
        to the clean embeddings at which gradients are averaged. At `lm.embed` the effects then sum
        to the difference of the metric, up to the error of the midpoint rule.

    Raises:
      ValueError: A site holds masks or logits, or latents without a splice in the contrast, or
        `where` selects nothing of it; or `steps` is below 0, or above 0 with a vision site.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must be 0 (the gradient at the clean activations) or more")
    for site in sites:
        if site in S.MASKS or site == S.logits:
            raise ValueError(f"{site} has no activations that could be patched in part")
        if steps and site.module != "lm":
            raise ValueError(
                f"steps={steps}: integrated gradients run along the line between the embeddings of "
                f"the LM, which {site} precedes; use steps=0 for it"
            )
    selector, maps = tokens.of(where), contrast.model.token_maps(contrast.clean)
    for site in sites:
        if not np.asarray(selector.mask(site.entry(maps))).any():
            raise ValueError(f"where= selects no token of this batch at {site}")
    gradients = _gradients(contrast, tuple(dict.fromkeys(sites)), selector, steps)
    values, clean, corrupt = jax.device_get(gradients)
    finite = {name: checks.finite(value, f"effects at {name}") for name, value in values.items()}
    return Effects(
        {name: value.astype(np.float32) for name, value in finite.items()},
        checks.finite(clean, "the metric"),
        checks.finite(corrupt, "the metric"),
    )


@functools.partial(jax.jit, static_argnames=("sites", "steps"))
def _gradients(contrast: Contrast, sites: tuple[Site, ...], where: tokens.Where, steps: int):
    """Return the effects by site, and the metric of each row of both batches."""
    shapes, latents = _shapes(contrast, contrast.clean)
    captures = {f"at {site.name}": keep(site, where=where) for site in sites}
    ends = {site.name: keep(site) for site in input_sites(contrast)} if steps else {}
    corrupt = contrast.run(contrast.corrupt, contrast.edits, captures | ends)
    gates = {
        site.name: _open_gates(look_up(site, shapes), site, latents.get(site.name))
        for site in sites
    }

    def metric(gates, edits, fn, others):
        for site in sites:
            closed = with_layers(site, others[f"at {site.name}"])
            edits >>= edits_.call(site, fn, where=where, gate=gates[site.name], closed=closed)
        values = contrast.metric(contrast.run(contrast.clean, edits))
        return values.sum(), values

    if not steps:
        grad = jax.value_and_grad(metric, has_aux=True)
        closed = corrupt.captures
        (_, clean), gradient = grad(gates, contrast.edits, attribution.interpolate, closed)
        return _without_widths(gradient, sites), clean, contrast.metric(corrupt)

    clean = contrast.run(contrast.clean, contrast.edits, captures)
    change = {name: clean[name] - corrupt[name] for name in captures}

    def gradient_at(share):
        edits = line_between(contrast, corrupt.captures, share)
        gradient, _ = jax.grad(metric, has_aux=True)(gates, edits, _move, change)
        return gradient

    gradient = attribution.mean_along_line(gradient_at, jax.tree.map(jnp.zeros_like, gates), steps)
    return _without_widths(gradient, sites), contrast.metric(clean), contrast.metric(corrupt)


def _move(x: Array, gate: Array, closed: Array) -> Array:
    """Return x where a gate is 1, x without the given change where it is 0."""
    return at_least_float32(x) - (1 - gate) * closed


def _shapes(
    contrast: Contrast, batch: Batch
) -> tuple[dict[str, S.SiteShape], dict[str, LatentSite]]:
    """Return the sites of a pass with the edits of the contrast, and those of latents apart."""
    shapes = site_shapes(contrast.model, batch)
    latents = latent_sites(contrast.edits, shapes)
    return shapes | {name: of.spec for name, of in latents.items()}, latents


def _open_gates(spec: S.SiteShape, site: Site, latents: LatentSite | None) -> Float[Array, "L ..."]:
    layers = spec.layers if latents is None else len(latents.layers)
    lengths = (1 if a in WIDTHS else n for a, n in zip(site.axes, spec.shape, strict=True))
    return jnp.ones((layers, *lengths), jnp.float32)


def _without_widths(gradients: dict[str, Array], sites: Sequence[Site]) -> dict[str, Array]:
    def squeeze(site: Site, gradient: Array) -> Array:
        widths = [1 + axis for axis, letter in enumerate(site.axes) if letter in WIDTHS]
        return jnp.squeeze(gradient, widths if site.stacked else [0, *widths])

    return {site.name: squeeze(site, gradients[site.name]) for site in sites}


def exact(
    contrast: Contrast, target: Target, *, over: Sequence[Axis] = ("layer", "token"),
    where: Selector = None,
) -> Float[np.ndarray, "L B ..."]:  # fmt: skip
    """Compute the effect of each patch by a pass of its own, in a sweep.

    Args:
      contrast: The contrast.
      target: A site of the language model, or some of its layers and units; a site of the
        residual's width is addressed by layers only.
      over: The axes along which patches differ: "layer", "token", "unit" (a head, neuron or
        latent). A patch covers the other axes whole.
      where: The tokens that are patched, in the clean batch; all by default.

    Returns:
      The effects in the axes of `Effects.values`, of length 1 for axes that are patched whole; 0
      for parts that are not selected.

    Raises:
      ValueError: The site is not of the language model, has latents without a splice in the
        contrast, or has no units but the target or `over` gives some.
    """
    address = Address.of(target)
    site = address.site
    if site.module != "lm" or site in (*S.MASKS, *S.PATTERNS):
        raise ValueError(f"exact patches are of activations of the language model, not {site}")
    has_units = site.axes[site.unit_axis] not in WIDTHS
    if wrong := [axis for axis in over if axis not in AXES]:
        raise ValueError(f"over={wrong}: a patch selects one layer, token or unit")
    if "unit" in over and not has_units:
        raise ValueError(f"over=unit: {site} is patched as a whole, it has no heads or neurons")
    if address.units.form != "all" and not has_units:
        raise ValueError(
            f"exact patches of {site} are of the whole state, which has no heads or neurons: give "
            "its layers alone"
        )
    batch = contrast.joined()
    shapes, latents = _shapes(contrast, batch)
    spec = look_up(site, shapes)
    width = spec.shape[site.unit_axis] if has_units else 1
    units = np.broadcast_to(np.asarray(address.mask(spec.layers, width)), (spec.layers, width))
    if site.name in latents:
        units = latents[site.name].with_dictionary(units, site.name)
    clean = np.asarray(tokens.of(where).mask(contrast.clean.tokens))
    at = np.concatenate([clean, clean])  # the rows of the joined batch
    lengths = zip(AXES, (spec.layers, at.shape[1], width), strict=True)
    shape = [length if axis in over else 1 for axis, length in lengths]
    patches: list[Edits] = []
    places: list[tuple[int, ...]] = []
    written: list[np.ndarray] = []
    chosen = zip((units.any(1), at[: contrast.rows].any(0), units.any(0)), shape, strict=True)
    for place in itertools.product(*(_places(np.asarray(axis), n) for axis, n in chosen)):
        units_here, at_here = _selected(units, at, place, shape)
        rows = np.asarray(at_here[: contrast.rows].any(1))
        if rows.any() and units_here.any():
            patches.append(_one_patch(contrast.rows, site, units_here, at_here))
            places.append(place)
            written.append(rows)
    if not patches:
        raise ValueError(f"where= selects no token of this batch at {site}")
    patched = contrast.sweep(metric_of_clean_rows, batch, patches, "patches")
    falls = contrast.metric_of(contrast.clean) - patched
    effects = np.zeros((*shape, contrast.rows), np.float32)
    effects[tuple(np.array(places).T)] = np.where(written, falls, 0)
    effects = np.moveaxis(effects, -1, 1)  # [L, B, T, units]
    effects = effects if has_units else effects[..., 0]
    if site.name in latents and "layer" in over:
        effects = effects[latents[site.name].layers]
    return effects if site.stacked else effects[0]


def _places(chosen: Bool[np.ndarray, " n"], length: int) -> list[int]:
    """Return the chosen indices of an axis of this length; 0 if the axis is patched whole."""
    return np.flatnonzero(chosen).tolist() if length == len(chosen) else [0]


def _selected(
    units: Bool[np.ndarray, "L width"], at: Bool[np.ndarray, "B T"],
    place: Sequence[int], shape: Sequence[int],
) -> tuple[Bool[np.ndarray, "L width"], Bool[np.ndarray, "B T"]]:  # fmt: skip
    """Restrict layers, units and tokens to one position on the axes of `shape`."""
    layer, unit = np.ogrid[: units.shape[0], : units.shape[1]]
    token = np.arange(at.shape[1])

    def one(index: np.ndarray, axis: int) -> np.ndarray:
        return (index == place[axis]) | (shape[axis] == 1)

    return units & one(layer, 0) & one(unit, 2), at & one(token, 1)


def _one_patch(
    rows: int, site: Site, units: Bool[np.ndarray, "L width"], at: Bool[np.ndarray, "B T"]
) -> Edits:
    """Return the patch of the clean rows of a joined batch."""
    into = np.flatnonzero(at[:rows].any(1))
    return edits_.patch(_address(site, units), into + rows, into, where=tokens.mask(at))


def _address(site: Site, units: Bool[np.ndarray, "L width"]) -> Address:
    if not site.stacked:
        return site[units[0]] if units.shape[1] > 1 else Address.of(site)
    if units.shape[1] == 1:
        return site[units[:, 0]]
    pairs = np.argwhere(units)  # smaller than a mask over all latents
    return site[pairs] if len(pairs) < units.shape[1] else site[units]
