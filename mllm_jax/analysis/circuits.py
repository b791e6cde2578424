"""Circuits: whether some heads and MLPs alone carry the difference between two inputs.

The nodes are heads and MLPs, at all tokens or by kind of token; a circuit is a mask of them. Nodes
outside of it are set to their corrupt values, nodes inside are computed. A circuit is

* faithful if its metric is that of the whole model;
* complete if the metric of its complement is that of the corrupt pass;
* minimal if the metric falls when any of its nodes is removed.

    kinds = ("image", "text")
    scores = node_scores(patching.attribute(contrast, NODE_SITES), contrast, kinds=kinds)
    found = curves(contrast, scores, sizes=(1, 2, 4, 8), kinds=kinds)
    found.faithfulness, found.random_faithfulness

The embedding is clean in all of them.

(Wang et al. 2022; Marks et al. 2024.) Every circuit is a lane of one sweep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mllm_jax import sites as S
from mllm_jax import tokens
from mllm_jax.analysis import attribution, checks
from mllm_jax.analysis.contrasts import Contrast, metric_of_clean_rows
from mllm_jax.analysis.patching import Effects
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.edits import Edits
from mllm_jax.typing import Bool, Float, Int

NODE_SITES = (S.lm.attn.heads, S.lm.mlp.out)
ANY = ("any",)  # all tokens as one kind


@dataclasses.dataclass(frozen=True)
class Curves:
    """The metric of circuits of growing size and of random circuits.

    Attributes:
      sizes: The number of nodes, int[n].
      circuit: The metric of each circuit, float[n, B].
      complement: The metric of all nodes but those of the circuit, float[n, B].
      random_circuit: The metric of random circuits, float[draws, n, B].
      random_complement: The metric of all nodes but those of a random circuit, float[draws, n, B].
      clean: The metric of the clean batch, float[B].
      corrupt: The metric of the corrupt batch, float[B].
    """

    sizes: Int[np.ndarray, " n"]
    circuit: Float[np.ndarray, "n B"]
    complement: Float[np.ndarray, "n B"]
    random_circuit: Float[np.ndarray, "draws n B"]
    random_complement: Float[np.ndarray, "draws n B"]
    clean: Float[np.ndarray, " B"]
    corrupt: Float[np.ndarray, " B"]

    def recovered(self, metric: Float[np.ndarray, "... B"]) -> Float[np.ndarray, ...]:
        """Return the share of the difference between corrupt and clean, over all rows.

        Raises:
          ValueError: The metrics of the clean and the corrupt batch are equal.
        """
        difference = (self.clean - self.corrupt).sum()
        if not difference:
            raise ValueError(
                "the metric of the clean and of the corrupt batch is the same over all rows: there "
                "is no difference that a circuit could recover"
            )
        return (metric - self.corrupt).sum(-1) / difference

    @property
    def faithfulness(self) -> Float[np.ndarray, " n"]:
        """The share that the circuit recovers; 1 for the whole model."""
        return self.recovered(self.circuit)

    @property
    def incompleteness(self) -> Float[np.ndarray, " n"]:
        """The share that is left without the circuit; 0 for a complete one."""
        return self.recovered(self.complement)

    @property
    def random_faithfulness(self) -> Float[np.ndarray, "draws n"]:
        """`faithfulness` of random circuits."""
        return self.recovered(self.random_circuit)

    @property
    def random_incompleteness(self) -> Float[np.ndarray, "draws n"]:
        """`incompleteness` of random circuits."""
        return self.recovered(self.random_complement)


def node_scores(
    effects: Effects, contrast: Contrast, *, kinds: Sequence[str] = ANY
) -> Float[np.ndarray, "kinds L nodes"]:
    """Sum effects over the tokens of each kind and average them over rows.

    Args:
      effects: The result of `patching.attribute` for `NODE_SITES`.
      contrast: The contrast.
      kinds: Names of selectors of tokens that do not overlap, such as "image" and "text".

    Returns:
      The score of each head of a layer, and then of its MLP: [kinds, L, N + 1].
    """
    heads, mlp = (effects.values[site.name] for site in NODE_SITES)
    values = np.concatenate([heads, mlp[..., None]], -1)  # [L, B, T, N + 1]
    masks = np.stack(_masks(contrast, kinds))
    return np.einsum("LBTn,kBT->kLn", values, masks) / contrast.is_row.sum()


def evaluate(
    contrast: Contrast, circuits: Bool[np.ndarray, "R kinds L nodes"], *,
    kinds: Sequence[str] = ANY,
) -> Float[np.ndarray, "R B"]:  # fmt: skip
    """Compute the metric of circuits with all other nodes corrupt.

    Args:
      contrast: The contrast.
      circuits: The nodes of each circuit, as in `node_scores`.
      kinds: See `node_scores`.
    """
    circuits = checks.mask(circuits, "circuits")
    lm = contrast.model.config.lm
    if circuits.shape[1:] != (shape := (len(kinds), lm.layers, lm.heads + 1)):
        raise ValueError(f"circuits must be [R, {shape}], got shape {circuits.shape}")
    masks = _masks(contrast, kinds)
    patches = [_corrupt_outside(contrast, masks, circuit) for circuit in circuits]
    return contrast.sweep(metric_of_clean_rows, contrast.joined(), patches, "circuits")


def curves(
    contrast: Contrast, scores: Float[np.ndarray, "kinds L nodes"], sizes: Sequence[int], *,
    kinds: Sequence[str] = ANY, draws: int = 5, seed: int = 0,
) -> Curves:  # fmt: skip
    """Compute faithfulness and completeness of the circuits of the largest scores.

    Args:
      contrast: The contrast.
      scores: The score of each node, see `node_scores`; the largest make a circuit.
      sizes: Numbers of nodes.
      kinds: See `node_scores`.
      draws: The number of random circuits of each size.
      seed: The seed of the random circuits.

    Raises:
      ValueError: A size is below 0 or above the number of nodes.
    """
    scores = checks.finite(scores, "scores", axes="[kinds, L, nodes]")
    if any(not 0 <= size <= scores.size for size in sizes):
        raise ValueError(f"sizes={list(sizes)}: there are {scores.size} nodes")
    rng = np.random.default_rng(seed)
    rankings = [scores, *(rng.random(scores.shape) for _ in range(draws))]
    masks = np.stack([[attribution.top_mask(r, n) for n in sizes] for r in rankings])
    lanes = np.stack([masks, ~masks])  # [2, 1 + draws, n, kinds, L, nodes]
    metric = evaluate(contrast, lanes.reshape(-1, *scores.shape), kinds=kinds)
    inside, outside = metric.reshape(*lanes.shape[:3], -1)
    ends = contrast.metric_of(contrast.clean), contrast.metric_of(contrast.corrupt)
    return Curves(np.asarray(sizes), inside[0], outside[0], inside[1:], outside[1:], *ends)


def minimality(
    contrast: Contrast, circuit: Bool[np.ndarray, "kinds L nodes"], *, kinds: Sequence[str] = ANY
) -> Float[np.ndarray, "kinds L nodes"]:
    """Compute the decrease of the metric when each node is removed from a circuit, mean over rows.

    Args:
      contrast: The contrast.
      circuit: The nodes of the circuit.
      kinds: See `node_scores`.

    Returns:
      The decrease for each node of the circuit; 0 for other nodes.
    """
    circuit = checks.mask(circuit, "circuit")
    lanes = np.concatenate([circuit[None], without_each(circuit, circuit)])
    metric = evaluate(contrast, lanes, kinds=kinds)[:, contrast.is_row].mean(-1)
    falls = np.zeros(circuit.shape)
    falls[circuit] = metric[0] - metric[1:]
    return falls


def without_each(
    circuit: Bool[np.ndarray, "kinds L nodes"], nodes: Bool[np.ndarray, "kinds L nodes"]
) -> Bool[np.ndarray, "R kinds L nodes"]:
    """Return a circuit without each of some nodes in turn."""
    places = np.argwhere(nodes)
    lanes = np.repeat(circuit[None], len(places), 0)
    lanes[(np.arange(len(places)), *places.T)] = False
    return lanes


def _masks(contrast: Contrast, kinds: Sequence[str]) -> list[Bool[np.ndarray, "B T"]]:
    """Return the tokens of each kind, in the clean batch."""
    map_ = contrast.clean.tokens
    selectors = [tokens.of(None if kind in ANY else kind) for kind in kinds]
    masks = [np.asarray(selector.mask(map_)) for selector in selectors]
    if (np.sum(masks, 0) > 1).any():
        raise ValueError(f"kinds={', '.join(kinds)}: a token belongs to several of these kinds")
    if empty := [kind for kind, mask in zip(kinds, masks, strict=True) if not mask.any()]:
        raise ValueError(f"kinds={', '.join(kinds)}: the batch has no token of {', '.join(empty)}")
    return masks


def _corrupt_outside(
    contrast: Contrast, masks: Sequence[np.ndarray], circuit: Bool[np.ndarray, "kinds L nodes"]
) -> Edits:
    """Return the patches of a joined batch that corrupt all nodes outside of a circuit."""
    edits = Edits()
    for mask, inside in zip(masks, circuit, strict=True):
        rows = np.flatnonzero(mask.any(1))
        where = tokens.mask(np.concatenate([mask, mask]))
        for site, outside in ((S.lm.attn.heads, ~inside[:, :-1]), (S.lm.mlp.out, ~inside[:, -1])):
            if outside.any():
                edits >>= edits_.patch(site[outside], rows + contrast.rows, rows, where=where)
            else:  # An edit must select something: patch rows with themselves.
                edits >>= edits_.patch(site, rows, rows, where=where)
    return edits
