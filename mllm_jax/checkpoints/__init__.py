"""Readers and writers of checkpoint files, independent of model families."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
