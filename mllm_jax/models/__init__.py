"""One file per network. Networks know sites; they know no data, files or experiments."""

import functools

from mllm_jax import deprecated

__getattr__ = functools.partial(deprecated.member, __name__)
