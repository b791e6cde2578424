"""Routes of patches: the row and the token that are read for each token that is written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.sites import Site
from mllm_jax.typing import AnyArray, Bool, Int


def bind_route(
    site: Site,
    where: Bool[AnyArray, "B T"],
    readers: Bool[AnyArray, "rows B"] | None,
    source: Int[AnyArray, ...],
    into: Int[AnyArray, ...],
) -> tuple[Bool[AnyArray, "B T"], dict[str, Int[AnyArray, "B T"]]]:
    """Return the tokens that a patch writes, and the row and the token that it reads for each.

    At a site of tiles B counts tiles, and the tokens of a row are those of the tiles that it reads,
    one tile after the other. Rows out of range, rows with different numbers of selected tokens,
    rows that are written twice, and tiles that another row reads as well cannot be patched: they
    raise an error if the arrays are known, and are not written if they are traced.

    Args:
      site: The site of the patch.
      where: The selected tokens.
      readers: Which rows read each tile, at a site of tiles; None if B counts rows.
      source: The rows that are read.
      into: The rows that are written.
    """
    B, T = where.shape
    readers = np.eye(B, dtype=bool) if readers is None else readers
    arrays = where, readers, source, into
    known = not any(isinstance(array, jax.core.Tracer) for array in arrays)
    xp = np if known else jnp
    where, readers, source, into = map(xp.asarray, arrays)
    source, into = xp.broadcast_arrays(*map(xp.atleast_1d, (source, into)))

    def tiles_of(rows):
        """Return bool[pairs, rows], which row it is, and bool[pairs, B], which tiles it reads."""
        is_row = rows[:, None] == xp.arange(len(readers))
        return is_row, (is_row[:, :, None] & readers).any(1)

    (_, read), (is_row, written) = tiles_of(source), tiles_of(into)
    others = (~is_row[:, :, None] & readers).any(1)
    shared = (written & others & where.any(1)).any(1)
    read, written = ((tiles[:, :, None] & where).reshape(-1, B * T) for tiles in (read, written))
    counts = read.sum(1), written.sum(1)
    if known:
        _check(site, len(readers), source, into, counts, shared)
    once = (into[:, None] == into).sum(1) == 1
    written = written & (once & ~shared & (counts[0] == counts[1]))[:, None]
    # The tokens that are read come first; the n-th written token takes the n-th of them.
    order = xp.argsort(~read, axis=1, stable=True)
    at = xp.take_along_axis(order, xp.maximum(xp.cumsum(written, 1) - 1, 0), 1)
    at = xp.where(written, at, 0).sum(0).reshape(B, T)  # at most one pair writes a token
    along = {"row": (at // T).astype(xp.int32), "at": (at % T).astype(xp.int32)}
    return written.any(0).reshape(B, T), along


def _check(site: Site, rows: int, source, into, counts, shared) -> None:
    """Raise an error if a pair of rows cannot be patched."""
    if len(set(into.tolist())) < len(into):
        raise ValueError(f"the patch of {site.name} writes a row twice: {into.tolist()}")
    for a, b, read, written, is_shared in zip(source, into, *counts, shared, strict=True):
        if not (0 <= a < rows and 0 <= b < rows):
            raise ValueError(
                f"the patch of {site.name} reads row {a} and writes row {b}: "
                f"the batch has rows 0 to {rows - 1}"
            )
        if read != written or not read:
            raise ValueError(
                f"the patch of {site.name} matches {read} tokens of row {a} with {written} "
                f"of row {b}: the counts must be equal and not zero"
            )
        if is_shared:
            raise ValueError(
                f"the patch of {site.name} writes the pictures of row {b}, which another row of "
                "the batch shares: give each row its own with model.unshared(batch)"
            )
