"""Leave out the pictures of one split that are near-duplicates of pictures in another."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from mllm_jax.data.domains import Domain, Example
from mllm_jax.data.embedded import recipe


def leave_out(
    domain: Domain, others: Iterable[Example], count: int, *, near_copy: float = recipe.NEAR_COPY
) -> Domain:
    """Return the first pictures of a domain that are not near-duplicates of others.

    The rule is that of the embedded domains and of tasks: the correlation of grey thumbnails, also
    mirrored. The number of pictures that are left out is logged as a warning.

    Args:
      domain: The domain, such as a test split.
      others: The pictures of another split.
      count: The number of pictures that are needed; no more are read.
      near_copy: The correlation from which two pictures are near-duplicates.

    Raises:
      ValueError: All pictures are near-duplicates.
    """
    seen = [recipe.thumbnail(example.image)[0] for example in others]
    if not seen:
        return domain
    known = np.stack(seen)
    kept: list[Example] = []
    copies = 0
    for example in domain:
        if len(kept) == count:
            break
        if recipe.likeness(recipe.thumbnail(example.image), known) < near_copy:
            kept.append(example)
        else:
            copies += 1
    if not kept:
        raise ValueError(
            f"domain {domain.name!r}: all {copies} pictures of its {domain.split} split are near "
            "copies of pictures in the other split; add pictures that differ"
        )
    if copies:
        logging.getLogger(__name__).warning(
            f"domain {domain.name!r}: {copies} pictures of its {domain.split} split are near "
            "copies of pictures in the other split, and are left out"
        )
    return Domain(domain.name, domain.split, kept) if copies else domain
