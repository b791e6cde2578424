"""Checkpoints as tables: readers and writers of files, which know no family."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
