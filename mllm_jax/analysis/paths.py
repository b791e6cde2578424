"""Path patching: the effect of a sender on the metric through a receiver.

A path (Wang et al. 2022, "Interpretability in the wild"; Goldowsky-Dill et al. 2023) is a chain of
patches between four rows of one batch, so that one pass computes it and a sweep many:

    row     what it computes
    clean   the clean pass
    corrupt the corrupt pass
    direct  the clean pass with the sender from `corrupt` and all heads and MLPs from `clean`,
            except the receiver and those that the path may lead through
    patched the clean pass with the receiver from `direct`

    effect(contrast, [Path(S.lm.attn.heads[4, [2]], S.lm.attn.q[9, [3]])])     # float32[1, B]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.analysis.contrasts import Contrast
from mllm_jax.batch import Batch
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes.run import Out
from mllm_jax.sites import Address, Site, Target
from mllm_jax.tokens import Selector, Where
from mllm_jax.typing import Array, Float

WORLDS = 4
FROZEN: tuple[Site, ...] = (S.lm.attn.heads, S.lm.mlp.out)
# Parts of a head or an MLP, which act only through it.
_WITHIN: dict[Site, tuple[Site, ...]] = {
    S.lm.attn.heads: (S.lm.attn.q, S.lm.attn.k, S.lm.attn.v),
    S.lm.mlp.out: (S.lm.mlp.input, S.lm.mlp.gate, S.lm.mlp.act, S.lm.mlp.gated),
}


@dataclasses.dataclass(frozen=True)
class Path:
    """A path from a sender to a receiver.

    Attributes:
      sender: A site or address whose corrupt value is sent: `lm.embed`, heads, an MLP; or a part
        of these in one layer, such as neurons, which acts by way of its own head or MLP there.
      receiver: A site or address of a later layer that receives it: queries, keys or values of
        heads, `lm.attn.heads`, `lm.mlp.out`, or the last `lm.resid_post` for the logits.
      where: The tokens of the sender, in the clean batch; all by default.
      to: The tokens of the receiver, in the clean batch; all by default.
      through: Sites of `FROZEN` that the path may lead through: `(S.lm.mlp.out,)` leaves MLPs free,
        as Wang et al. do.
    """

    sender: Target
    receiver: Target
    where: Selector = None
    to: Selector = None
    through: tuple[Site, ...] = ()

    def edits(self, rows: int, layers: int) -> Edits:
        """Return the patches of a batch of `worlds`.

        Args:
          rows: The number of rows B of each world.
          layers: The number of layers L of the language model.

        Raises:
          ValueError: The sender or the receiver is not of the language model, the receiver does not
            come after the sender, or the sender is a part of heads or MLPs in several layers.
        """
        sender, receiver = Address.of(self.sender), Address.of(self.receiver)
        sent, last = _layers(sender, layers), _layers(receiver, layers).max()
        first = int(sent.min())
        order = S.TABLE.index
        if (last, order(receiver.site)) <= (first, order(sender.site)):
            raise ValueError(
                f"no path leads from {sender.site} of layer {first} to {receiver.site} of layer "
                f"{last}: the receiver must come after the sender"
            )
        clean, corrupt, direct, patched = (np.arange(rows) + n * rows for n in range(WORLDS))
        # The receiver is read before its head or MLP is frozen; below the sender, the rows are
        # equal.
        where, to = (_in_each_world(of, rows) for of in (self.where, self.to))
        edits = edits_.patch(receiver, direct, patched, where=to)
        for site in FROZEN:
            if site in self.through:
                continue
            start = first
            if sender.site in _WITHIN[site]:
                _check_one_layer(sender, sent)
                start = first + 1
            if start < layers:
                edits >>= edits_.patch(site[start:], clean, direct)
            else:  # An edit must select something: patch rows with themselves.
                edits >>= edits_.patch(site[0:], direct, direct)
        return edits >> edits_.patch(sender, corrupt, direct, where=where)


def _in_each_world(selector: Selector, rows: int) -> Where:
    """Return a selector of the clean batch as one of its four worlds."""
    where = tokens.of(selector)
    parts = tuple(_in_each_world(part, rows) for part in where.parts)
    is_mask = where.form == "mask" and len(np.asarray(where.value)) == rows
    value = np.concatenate([np.asarray(where.value)] * WORLDS) if is_mask else where.value
    return dataclasses.replace(where, parts=parts, value=value)


def _check_one_layer(sender: Address, layers: np.ndarray) -> None:
    if layers.min() < layers.max():
        raise ValueError(
            f"the sender {sender.site} is of layers {layers.min()} to {layers.max()}: a sender "
            "that is a part of a head or an MLP must be in one layer"
        )


def _layers(address: Address, layers: int) -> np.ndarray:
    """Return the layers of an address; the first or last if its site exists once."""
    if address.site.module != "lm" or address.site.is_latents:
        raise ValueError(f"paths are between sites of the language model, not {address.site}")
    if not address.site.stacked:
        return np.array([layers - 1 if address.site == S.lm.norm else 0])
    units = address.units
    if units.form == "pairs":
        return np.asarray(units.value)[:, 0] % layers
    if units.form == "mask" and units.value.ndim == 2:
        return np.flatnonzero(np.asarray(units.value).any(-1))
    return np.asarray(address.layers.indices(layers, f"{address.site}: layer"))


def worlds(contrast: Contrast) -> Batch:
    """Return the batch of a path: the rows clean, corrupt, direct and patched."""
    clean, corrupt = np.arange(contrast.rows), np.arange(contrast.rows) + contrast.rows
    return contrast.joined().take(np.concatenate([clean, corrupt, clean, clean]))


def effect(contrast: Contrast, paths: Sequence[Path]) -> Float[np.ndarray, "R B"]:
    """Compute the decrease of the metric through each path, in a sweep.

    Args:
      contrast: The contrast.
      paths: Paths between the same two sites, with the same `through`; layers, units and tokens may
        differ.

    Raises:
      ValueError: A path is impossible (see `Path.edits`), or paths are between different sites.
    """
    layers = contrast.model.config.lm.layers
    patches = [path.edits(contrast.rows, layers) for path in paths]
    patched = contrast.sweep(_of_patched_rows, worlds(contrast), patches, "paths")
    return (contrast.metric_of(contrast.clean) - patched).astype(np.float32)


def _of_patched_rows(out: Out, metric: Callable[[Out], Array]) -> Array:
    """Return the metric of the last of the four worlds."""
    assert out.logits is not None, "the metric of a contrast reads logits"
    return metric(dataclasses.replace(out, logits=out.logits[-(len(out.logits) // WORLDS) :]))
