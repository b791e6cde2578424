"""Find the first site and layer of a pass that is not finite, from one boolean for each."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

from mllm_jax import sites, tokens
from mllm_jax.interventions.captures import Capture
from mllm_jax.sites import Address, SiteShape
from mllm_jax.typing import AnyArray, Bool

_PREFIX = "is finite: "  # no name that a user gives to a capture
# Masks are boolean; a pattern is materialised only if it is captured, and heads show its NaNs.
_EXCLUDED = (*sites.MASKS, *sites.PATTERNS)


def captures(shapes: dict[str, SiteShape], logits: str) -> dict[str, Capture]:
    """Return a capture for each site of a pass, which checks all its tokens.

    Args:
      shapes: The sites of the pass.
      logits: The logits that the pass computes, as in `run`.
    """
    checked = [
        site
        for site in map(sites.get, shapes)
        if site not in _EXCLUDED and (logits != "none" or site != sites.logits)
    ]
    return {_PREFIX + site.name: Capture("finite", Address(site), tokens.every) for site in checked}


def separate(
    captured: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Bool[AnyArray, ...]]]:
    """Separate the captures of the user from the checks of each site, bool[L]."""
    checks = {k.removeprefix(_PREFIX): v for k, v in captured.items() if k.startswith(_PREFIX)}
    return {k: v for k, v in captured.items() if not k.startswith(_PREFIX)}, checks


def first_not_finite(finite: dict[str, Bool[AnyArray, ...]]) -> tuple[str, int | None] | None:
    """Return the first site that is not finite, with its layer; None if all are finite.

    Args:
      finite: `Out.finite`: bool[L] of each site, or bool[] of a site without layers.
    """
    # The table lists the sites of a layer in the order in which they are computed.
    order = [site for site in sites.TABLE if site.name in finite]
    known = [(site, np.atleast_1d(np.asarray(finite[site.name]))) for site in order]
    for (_, stacked), group in itertools.groupby(known, lambda e: (e[0].module, e[0].stacked)):
        members = list(group)
        for layer in range(len(members[0][1])):
            for site, ok in members:
                if not ok[layer]:
                    return site.name, layer if stacked else None
    return None


def require(finite: dict[str, Bool[AnyArray, ...]], of: str = "this pass") -> None:
    """Raise an error that names the first site that is not finite, unless values are traced.

    Args:
      finite: See `first_not_finite`.
      of: A description of the pass, for the message.

    Raises:
      ValueError: A site is not finite.
    """
    if any(isinstance(ok, jax.core.Tracer) for ok in finite.values()):
        return
    if (at := first_not_finite(finite)) is not None:
        name, layer = at
        where = name if layer is None else f"{name}[{layer}]"
        raise ValueError(
            f"{where} is the first site of {of} that is not finite: check the edits there, the "
            "weights that compute it, and whether its dtype can hold its values"
        )
