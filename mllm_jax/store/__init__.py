"""Write files atomically, and keep results with a record of their dependencies.

A store keeps arrays with fingerprints of everything that they depend on: model, edits, captures,
data, settings, functions and the format of the file. It is read, or resumed after a killed run,
only for the same dependencies; a store with other dependencies, or a damaged one, is refused in one
line. The steps of a study are such stores, so a killed study continues and produces the same bytes.
"""

import functools

from mllm_jax import deprecated
from mllm_jax.store.files import (
    atomic,
    atomic_json,
    atomic_npz,
    cache_directory,
    damaged_error,
    read_json,
    read_npz,
    write,
)
from mllm_jax.store.fingerprints import fingerprint
from mllm_jax.store.resumable import Store, mismatch_error
from mllm_jax.store.row_store import RowStore
from mllm_jax.store.workdir import Workdir, save_figure, write_manifest

__all__ = [
    "RowStore",
    "Store",
    "Workdir",
    "atomic",
    "atomic_json",
    "atomic_npz",
    "cache_directory",
    "damaged_error",
    "fingerprint",
    "mismatch_error",
    "read_json",
    "read_npz",
    "save_figure",
    "write",
    "write_manifest",
]

__getattr__ = functools.partial(deprecated.member, __name__)
