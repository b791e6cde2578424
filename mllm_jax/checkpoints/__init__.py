"""Checkpoints as tables: readers, the embedded model, loading and saving."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
