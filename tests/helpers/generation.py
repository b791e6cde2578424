"""Generation under edits, against passes over the whole text."""

from __future__ import annotations

import numpy as np

import mllm_jax as mj


def assert_equals_one_pass(model, batch, edits):
    """Three generated tokens are those of one pass over the prompt and the first two of them.

    They also differ from those without edits, so that the edits are seen.
    """
    found = mj.generate(model, batch, edits, max_new_tokens=3)
    plain = mj.generate(model, batch, max_new_tokens=3)
    tokens = np.asarray(found.tokens)
    assert (tokens != np.asarray(plain.tokens)).any()
    whole = batch.followed_by(tokens[:, :2], np.ones((len(tokens), 2), bool))
    again = mj.run(model, whole, edits, logits="all").logits[:, -2:].argmax(-1)
    np.testing.assert_array_equal(again, tokens[:, 1:])
