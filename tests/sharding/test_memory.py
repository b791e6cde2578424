"""The memory of devices, with NumPy arrays and arrays of JAX; `on_mesh.py` tests parts."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.sharding import memory


def test_bytes_on_a_device():
    tree = {"a": jnp.zeros((4, 3), jnp.bfloat16), "b": [np.zeros(5, np.float32)]}
    assert memory.bytes_on_device(tree) == 4 * 3 * 2 + 5 * 4


def test_the_device_of_numpy_arrays_is_the_default_one():
    assert memory.first_device({"a": np.zeros(3)}) == jax.local_devices()[0]
    assert memory.first_device({"a": np.zeros(3), "b": jnp.zeros(3)}) == jax.devices()[0]


def test_free_bytes(monkeypatch):
    """None on a CPU; never negative."""
    model = {"a": np.zeros(100, np.uint8)}
    assert memory.free_bytes(model) is None
    for limit, free in ((250, 150), (50, 0)):
        device = types.SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit})
        monkeypatch.setattr(memory, "first_device", lambda model, device=device: device)
        assert memory.free_bytes(model) == free
