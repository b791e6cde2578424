"""Networks, one per file. They depend on sites, but not on data, files or experiments."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
