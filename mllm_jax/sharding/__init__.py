"""Run on one device or a pod: meshes, sharding rules, collectives, several processes."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
