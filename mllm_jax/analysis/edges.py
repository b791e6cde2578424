"""Edge attribution patching: the effect of every edge between heads and MLPs, all at once.

An edge leads from the output of a sender (the embedding, a head, an MLP), which is added to the
residual, to the input of a later receiver (the queries, keys and values of a head, an MLP, the
output). Its effect is the decrease of the metric when the receiver reads the corrupt value of the
sender and everything else stays clean, as `paths.effect` computes exactly. The first-order estimate
is the product of the sender's change with the gradient at the receiver (EAP: Syed et al. 2023);
with `steps`, the gradient is averaged on the line between the embeddings (EAP-IG: Hanna et al.
2024).

Edits of the contrast apply in every pass. Edits other than additions that change the residual
between a sender and a receiver are refused, because an edge would lead through them.

    found = edges.attribute(contrast, steps=8)
    found.values                                  # float32[B, senders, receivers]
    found.top(20)                                 # [((layer, "head 3"), (layer, "q 1")), ...]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites as S
from mllm_jax.analysis import attribution, checks
from mllm_jax.analysis.contrasts import Contrast, input_sites, line_between
from mllm_jax.interventions import binding
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.captures import keep
from mllm_jax.interventions.edits import BoundEdit, Edit, Edits
from mllm_jax.interventions.layer_tap import LayerTap
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.models.decoder import Block, DecoderConfig
from mllm_jax.numerics import precision
from mllm_jax.typing import Array, Bool, Float

_SENDS = {"heads": keep(S.lm.attn.heads), "mlp": keep(S.lm.mlp.out), "embed": keep(S.lm.embed)}
_READS = (S.lm.attn.q, S.lm.attn.k, S.lm.attn.v, S.lm.mlp.out)
_IN_MLP = (S.lm.mlp.input, S.lm.mlp.gate, S.lm.mlp.act, S.lm.mlp.gated)
_BETWEEN = (S.lm.resid_pre, S.lm.attn_out, S.lm.resid_mid, S.lm.resid_post)


class Node(NamedTuple):
    """A sender or a receiver.

    Attributes:
      layer: Its layer; -1 for the embedding, L for the output.
      part: "embed", "head", "mlp", "q", "k", "v" or "output".
      unit: The number of the head, or of the key-value head for "k" and "v"; 0 for other parts.
    """

    layer: int
    part: str
    unit: int = 0


@dataclasses.dataclass(frozen=True)
class EdgeEffects:
    """The estimated effects of all edges.

    Attributes:
      values: The decrease of the metric of each row, summed over tokens, float32[B, senders,
        receivers]; 0 where there is no edge.
      senders: The senders, in the order of the values.
      receivers: The receivers, in the order of the values.
      is_edge: True where the receiver comes after the sender, bool[senders, receivers].
      is_row: False for rows that only pad the batch, bool[B]; None if there are none.
    """

    values: Float[np.ndarray, "B senders receivers"]
    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]
    is_edge: Bool[np.ndarray, "senders receivers"]
    is_row: Bool[np.ndarray, " B"] | None = None

    @classmethod
    def of(
        cls, values: Float[np.ndarray, "B senders receivers"], lm: DecoderConfig,
        is_row: Bool[np.ndarray, " B"] | None = None,
    ) -> EdgeEffects:  # fmt: skip
        """Return values with their senders and receivers in a language model.

        Args:
          values: A value for each pair of a sender and a receiver; pairs without an edge become 0.
          lm: The config of the language model.
          is_row: See the class.
        """
        heads, groups = range(lm.heads), range(lm.kv_heads)
        senders, receivers = [Node(-1, "embed")], []
        for layer in range(lm.layers):
            senders += [Node(layer, "head", n) for n in heads] + [Node(layer, "mlp")]
            receivers += [Node(layer, "q", n) for n in heads]
            receivers += [Node(layer, part, n) for part in "kv" for n in groups]
            receivers.append(Node(layer, "mlp"))
        receivers.append(Node(lm.layers, "output"))
        is_edge = np.array([[_leads(a, b) for b in receivers] for a in senders])
        values = np.where(is_edge, values, 0).astype(np.float32)
        return cls(values, tuple(senders), tuple(receivers), is_edge, is_row)

    def top(self, count: int) -> list[tuple[Node, Node, float]]:
        """Return the edges with the largest absolute mean effect, largest first."""
        mean = (self.values if self.is_row is None else self.values[self.is_row]).mean(0)
        places = attribution.top(np.abs(mean), min(count, int(self.is_edge.sum())))
        return [(self.senders[u], self.receivers[v], float(mean[u, v])) for u, v in places]


def attribute(contrast: Contrast, *, steps: int = 0) -> EdgeEffects:
    """Estimate the effect of every edge.

    It holds the outputs of all senders in memory, [senders, B, T, D].

    Args:
      contrast: The contrast.
      steps: 0 for the gradient at the clean activations; or the number of points from the corrupt
        to the clean embeddings at which gradients are averaged.

    Raises:
      ValueError: `steps` is below 0, or an edit of the contrast acts between sender and receiver.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must be 0 (the gradient at the clean activations) or more")
    check_edits(contrast.edits)
    values = checks.finite(_edge_effects(contrast, steps), "the effects of edges")
    return EdgeEffects.of(values, contrast.model.config.lm, contrast.is_row)


def check_edits(edits: Edits) -> None:
    """Check that edges can be attributed under some edits.

    Raises:
      ValueError: An edit changes a sender's output before a receiver reads it.
    """
    for edit in edits:
        if _stands_between(edit, edits):
            raise ValueError(
                f"edges take no {edit.kind} of {edit.address.site} among the edits of the contrast,"
                " because it changes a sender's output before a receiver reads it; use "
                "paths.effect for such paths"
            )


def _stands_between(edit: Edit, edits: Edits) -> bool:
    site, splice = edit.address.site, edit.splice
    if splice is None:
        return site in _BETWEEN and edit.kind != "add"
    is_edited = any(other.address.site == site.latents for other in edits)
    is_there = site in (*_IN_MLP, *_BETWEEN) or splice.reads != site
    return is_there and (is_edited or not splice.error)


def _leads(sender: Node, receiver: Node) -> bool:
    into_mlp = receiver.part == "mlp" and sender.part == "head"
    return sender.layer < receiver.layer or (into_mlp and sender.layer == receiver.layer)


@functools.partial(jax.jit, static_argnames="steps")
def _edge_effects(contrast: Contrast, steps: int) -> Float[Array, "B senders receivers"]:
    model = contrast.model
    ends = {site.name: keep(site) for site in input_sites(contrast)} if steps else {}
    clean = contrast.run(contrast.clean, contrast.edits, _SENDS).captures
    corrupt = contrast.run(contrast.corrupt, contrast.edits, _SENDS | ends).captures
    change = _added(model.lm.layers, clean) - _added(model.lm.layers, corrupt)
    change = jnp.swapaxes(change, 0, 1)  # rows first, so that no product of a layer copies it
    bound, _ = binding.bind(model, contrast.clean, contrast.edits, None)
    in_mlp = {i: edit for i, edit in enumerate(bound) if edit.site in _IN_MLP}

    def effects(edits):
        gradients, states = _gradients(contrast, edits)
        arrays = {i: (edit.units, edit.values) for i, edit in in_mlp.items()}
        each = model.lm.layers, gradients, states["pre"], states["mid"], arrays

        def receive(inputs):
            *inputs, arrays = inputs
            here = {
                i: dataclasses.replace(in_mlp[i], units=units, values=values)
                for i, (units, values) in arrays.items()
            }
            return _receive(change, *inputs, here)

        at_receivers = jax.lax.map(receive, each)  # [L, B, U, R]
        into_output = _product(change, gradients["output"][-1][None])
        inner = jnp.moveaxis(at_receivers, 0, 2)  # [B, U, L, R]
        return jnp.concatenate([inner.reshape(*inner.shape[:2], -1), into_output], -1)

    if not steps:
        return effects(contrast.edits)

    shape = jax.eval_shape(lambda: effects(contrast.edits))
    return attribution.mean_along_line(
        lambda share: effects(line_between(contrast, corrupt, share)),
        jnp.zeros(shape.shape, shape.dtype), steps,
    )  # fmt: skip


def _gradients(contrast: Contrast, edits: Edits) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the gradients of the metric at receivers, before their edits, and what they read."""
    states = {"pre": keep(S.lm.resid_pre), "mid": keep(S.lm.resid_mid)}
    reads = {site.name: site for site in _READS} | {"output": S.lm.resid_post}

    def metric(changes):
        added = Edits()
        for name, site in reads.items():
            added >>= edits_.add(site, changes[name])
        out = contrast.run(contrast.clean, added >> edits, states)
        return contrast.metric(out).sum(), out.captures

    shapes = site_shapes(contrast.model, contrast.clean)
    specs = {name: look_up(site, shapes) for name, site in reads.items()}
    zeros = {
        name: jnp.zeros((spec.layers, *spec.shape), spec.dtype) for name, spec in specs.items()
    }
    return jax.grad(metric, has_aux=True)(zeros)


def _added(layers: Block, captured: dict[str, Array]) -> Float[Array, "U B T D"]:
    """Return the output of each sender, which is added to the residual."""
    heads = jax.vmap(Block.split_by_head)(layers, captured["heads"])
    parts = jnp.concatenate([heads, captured["mlp"][..., None, :]], -2)  # [L, B, T, N + 1, D]
    parts = jnp.moveaxis(parts, 3, 1).reshape(-1, *captured["embed"].shape)
    return jnp.concatenate([captured["embed"][None].astype(parts.dtype), parts])


def _receive(
    change: Float[Array, "B U T D"], layer: Block, gradients: dict[str, Array],
    pre: Float[Array, "B T D"], mid: Float[Array, "B T D"], in_mlp: dict[int, BoundEdit],
) -> Float[Array, "B U R"]:  # fmt: skip
    """Return the effects of the edges into one layer: queries, keys, values by head, and MLP."""
    backs = []
    for site, name in zip(_READS[:3], ("q", "k", "v"), strict=True):
        _, pull = jax.vjp(lambda x, name=name: layer.attn.project(name, layer.attn_norm(x)), pre)
        gradient = gradients[site.name]
        one_head = (
            jnp.eye(gradient.shape[2], dtype=gradient.dtype)[:, None, None, :, None] * gradient
        )
        (back,) = jax.lax.map(pull, one_head)
        backs.append(back)
    _, pull = jax.vjp(lambda x: layer.added_by_mlp(x, LayerTap({}, 0, None, 1, in_mlp, {})), mid)
    (back,) = pull(gradients[S.lm.mlp.out.name])
    # One product per layer, so that the outputs of all senders are read once.
    return _product(change, jnp.concatenate([*backs, back[None]]))


def _product(change: Float[Array, "B U T D"], gradient: Float[Array, "R B T D"]) -> Array:
    gradient = precision.at_least_float32(gradient)
    return precision.einsum("BUTD,RBTD->BUR", precision.at_least_float32(change), gradient)
