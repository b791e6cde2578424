"""The positions of the tokens of a language model, and which of them attend to which."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mllm_jax.typing import AnyArray, Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions of some tokens of each row.

    A token attends to the valid tokens at the same or a lower position, and to those of its block.

    Attributes:
      order: The position of each token in its row, int32[B, T].
      valid: False for padding, bool[B, T].
      rotary: The positions of rotary embeddings if these differ from `order`: time, row and column
        of each token (mRoPE, Wang et al. 2024, Qwen2-VL), int32[3, B, T]; or None.
      segment: The segment of each token, int32[B, T]: it attends to segment 0 and its own. None if
        a row is one conversation.
      block: The block of each token, int32[B, T], 0 for none. The tokens of a block attend to each
        other whatever their order. None if all attention is causal.
    """

    order: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]
    rotary: Int[AnyArray, "3 B T"] | None = None
    segment: Int[AnyArray, "B T"] | None = None
    block: Int[AnyArray, "B T"] | None = None

    @property
    def is_causal(self) -> bool:
        """Whether no token attends to a later one."""
        return self.block is None

    def mask(
        self, key_order: Int[AnyArray, "B S"], key_valid: Bool[AnyArray, "B S"]
    ) -> Bool[AnyArray, "B 1 T S"]:
        """Return which keys each token attends to.

        Args:
          key_order: The positions of the keys: first of earlier tokens, then of these tokens.
          key_valid: Which keys are valid.
        """
        mask = key_order[:, None, None, :] <= self.order[:, None, :, None]
        if self.block is not None:
            mask |= self.same_block(key_order.shape[1])
        if self.segment is not None:
            segment = self.segment[:, None, None, :]
            mask &= (segment == 0) | (segment == self.segment[:, None, :, None])
        return mask & key_valid[:, None, None, :]

    def same_block(self, keys: int) -> Bool[Array, "B 1 T S"]:
        """Return which keys are in the block of each token; earlier tokens are in no block.

        Args:
          keys: The number S of keys: first of earlier tokens, then of these tokens.
        """
        if self.block is None:
            return jnp.zeros((1, 1, 1, 1), bool)
        same = (self.block[:, :, None] == self.block[:, None, :]) & (self.block > 0)[:, :, None]
        return jnp.pad(same, ((0, 0), (0, 0), (keys - self.order.shape[1], 0)))[:, None]

    def from_token(self, start: int) -> Positions:
        """Return the positions from a token on; `start` is static and the same in each row."""
        return jax.tree.map(lambda array: array[..., start:], self)

    def after(
        self, last: Int[AnyArray, " B"], steps: Int[AnyArray, " n"], valid: Bool[AnyArray, "B n"]
    ) -> Positions:
        """Return the positions of tokens that follow a prompt.

        Args:
          last: The last token of each prompt.
          steps: The distance of the tokens from the prompt: 1 for the first.
          valid: False for padding.
        """
        order = jnp.take_along_axis(jnp.asarray(self.order), last[:, None], 1) + steps
        if self.rotary is None:
            return Positions(order, valid)
        # A picture advances the positions by its longer side, so later tokens follow all of it.
        end = jnp.where(self.valid, self.rotary, 0).max((0, 2))
        rotary = jnp.broadcast_to(end[:, None] + steps, (3, *order.shape))
        return Positions(order, valid, rotary)
