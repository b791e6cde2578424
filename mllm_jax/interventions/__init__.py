"""Edits, captures and receipts: their definition, binding, application and syntax."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
