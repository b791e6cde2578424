"""Visual domains, classification tasks, VQA data sets, and sequences of batches."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
