"""The released models, as parameters of tests."""

from __future__ import annotations

import pytest

from mllm_jax import families

FIRST = {next(iter(family.released), None) for family in families.FAMILIES.values()}
# All of them; in the quick suite the first of each family.
EVERY = [
    pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow)
    for name in families.RELEASED
]
