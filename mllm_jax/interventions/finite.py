"""Where a pass is no longer finite: every site and layer asked, one boolean each."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

from mllm_jax import sites
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import SiteShape
from mllm_jax.sites import Address

_PREFIX = "is finite: "  # no name that a user gives to a capture
# A mask is boolean; a pattern is not made as a whole unless it is asked, and heads show it.
_LEFT_OUT = (sites.lm.attn.mask, sites.lm.attn.pattern)


def captures(shapes: dict[str, SiteShape], logits: str) -> dict[str, Capture]:
    """One for each site of a pass."""
    every = [sites.get(name) for name in shapes]
    asked = [s for s in every if s not in _LEFT_OUT and (logits != "none" or s != sites.logits)]
    return {_PREFIX + s.name: Capture("finite", Address(s), every) for s in asked}


def split(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Captures of the user, and bool[L] of each site."""
    checks = {k.removeprefix(_PREFIX): v for k, v in found.items() if k.startswith(_PREFIX)}
    return {k: v for k, v in found.items() if not k.startswith(_PREFIX)}, checks


def first_not_finite(finite: dict[str, Any]) -> tuple[str, int | None] | None:
    """The first site that is not finite, and its layer where there are layers; None if all are.

    Args:
      finite: `Out.finite`.
    """
    # The table has the sites of a layer in the order in which they are computed.
    order = [site for site in sites.TABLE if site.name in finite]
    known = [(site, np.atleast_1d(np.asarray(finite[site.name]))) for site in order]
    for (_, stacked), group in itertools.groupby(known, lambda e: (e[0].module, e[0].stacked)):
        group = list(group)
        for layer in range(len(group[0][1])):
            for site, ok in group:
                if not ok[layer]:
                    return site.name, layer if stacked else None
    return None


def require(finite: dict[str, Any]) -> None:
    """Raises an error that names the first site that is not finite; of traced values nothing.

    Raises:
      ValueError: a site is not finite.
    """
    if any(isinstance(ok, jax.core.Tracer) for ok in finite.values()):
        return
    if (at := first_not_finite(finite)) is not None:
        name, layer = at
        where = name if layer is None else f"{name}[{layer}]"
        raise ValueError(
            f"{where} is the first site of this pass that is not finite: look at the edits there, "
            "at the weights that make it, and at whether its dtype can hold its values"
        )
