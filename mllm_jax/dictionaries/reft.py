"""Learned low-rank edits of a state: representation fine-tuning.

LoReFT (Wu et al. 2024, "ReFT: Representation finetuning for language models") replaces the
component of a state h in a learned subspace by an affine function of h:

    h + R^T (W h + b - R h),    R with orthonormal rows

It is a dictionary with few dense latents, W h + b - R h: it is applied like a splice, and its
latents are a site. `training.edits.learn` trains it; the model is unchanged:

    def loss(reft, model, batch, key):
        edit = reft.edit(S.lm.resid_post[12], where=tok.image)
        return -steering.log_likelihood(model, batch, edit).mean()

    start = LoReFT.identity(width, rank=4)
    reft, losses = edits.learn(loss, start, model, batches, optax.adam(1e-2))
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.arguments import require_whole
from mllm_jax.interventions import edits
from mllm_jax.interventions.edits import Edits
from mllm_jax.numerics import precision
from mllm_jax.sites import Address, Target
from mllm_jax.tokens import Selector
from mllm_jax.typing import AnyArray, Array, ArrayLike, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoReFT:
    """A low-rank edit of a state. Its latents are the shift along each direction of the subspace.

    Apply it with `edit`: `mj.splice` would add the error back and leave the state unchanged.

    Attributes:
      basis: R, transposed: the directions of the subspace, float32[D, r]. They are orthonormalised
        where they are used, so that any optimiser may train them.
      weight: W, transposed, float32[D, r].
      bias: b, float32[r].
    """

    basis: Float[AnyArray, "D r"]
    weight: Float[AnyArray, "D r"]
    bias: Float[AnyArray, " r"]

    @classmethod
    def identity(cls, width: int, rank: int, *, seed: int = 0) -> LoReFT:
        """Return a LoReFT of a random subspace that changes nothing: W = R and b = 0.

        Args:
          width: The width D of the site.
          rank: The dimension r of the subspace.
          seed: Seed of the subspace.

        Raises:
          ValueError: The rank is not between 1 and the width.
        """
        width, rank = require_whole("width", width, least=1), require_whole("rank", rank, least=1)
        if rank > width:
            raise ValueError(f"rank={rank}: a subspace of a state of {width} has at most {width}")
        draw = np.random.default_rng(seed).standard_normal((width, rank))
        basis = np.linalg.qr(draw)[0].astype(np.float32)
        return cls(basis=basis, weight=basis, bias=np.zeros(rank, np.float32))

    def edit(self, target: Target, *, where: Selector = None, strength: ArrayLike = 1.0) -> Edits:
        """Return the edit of one layer.

        Args:
          target: The site and the layer, such as `lm.resid_post[12]`.
          where: The tokens that change.
          strength: A factor for the latents: 0 changes nothing, 1 is LoReFT.
        """
        address = Address.of(target)
        spliced = edits.splice(address, self, error=False, where=where)
        latents = dataclasses.replace(address, site=address.site.latents)
        return spliced >> edits.scale(latents, strength)

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of its input, of its latents and of its output."""
        D, r = self.basis.shape
        return D, r, D

    @property
    def directions(self) -> Float[Array, "D r"]:
        """The orthonormal directions of the subspace."""
        return precision.orthonormalize(precision.at_least_float32(jnp.asarray(self.basis)))

    def encode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B r"]:
        """Return W h + b - R h for states h, in float32 or better."""
        change = jnp.asarray(self.weight) - self.directions
        x = precision.at_least_float32(jnp.asarray(x))
        return precision.einsum("...D,Dr->...r", x, change) + self.bias

    def decode(self, latents: Float[Array, "*B r"], x: Float[Array, "*B D"]) -> Float[Array, ...]:
        """Return the states x, shifted by their latents."""
        return precision.at_least_float32(jnp.asarray(x)) + self.decode_change(latents, x)

    def decode_change(
        self, change: Float[Array, "*B r"], x: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        """Return the shift of states for a change of their latents."""
        del x
        return precision.einsum("...r,Dr->...D", change, self.directions)
