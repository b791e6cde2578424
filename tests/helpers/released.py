"""The released models, as parameters of tests."""

from __future__ import annotations

from mllm_jax import families
from tests.helpers import tiers

FIRST = {next(iter(family.released), None) for family in families.FAMILIES.values()}
# All of them; in the quick suite the first of each family.
EVERY = tiers.slow_except(FIRST, families.RELEASED)
