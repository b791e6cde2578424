"""Row by row is all at once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax.numerics import rows


@pytest.mark.parametrize("numbers", [0, 2**30])
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_by_row(transform, numbers):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    seen = []

    def fn(x, tree):
        seen.append(x.shape)
        assert tree["none"] is None
        return {"sum": x.sum(-1), "more": (x * tree["y"], tree["y"])}

    def both(x):
        return rows.map_rows_on_cpu(fn, x, {"y": x + 1, "none": None}, num_elements=numbers)

    got = transform(both)(x)
    np.testing.assert_allclose(got["sum"], x.sum(-1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["more"][0], x * (x + 1), rtol=0, atol=1e-6)
    assert ((1, *seen[0][1:]) in seen) == (numbers > rows.MAX_ELEMENTS_AT_ONCE)
