"""Edits and captures as pytrees, and the passes that take them."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
