"""Evaluation: classification by generated answers and by scores, CLIP zero-shot, metrics."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
