"""Tensors of a checkpoint become stacked, transposed and converted parameters."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.checkpoints import keys
from mllm_jax.loading import parameters

L, D, F = 3, 5, 37
TABLE = (
    keys.Row("embed.weight", "embed", keys.COPY),
    keys.Row("layers.{layer}.up.weight", "layers.up.kernel", keys.LINEAR),
    keys.Row("layers.{layer}.qk.weight", "layers.q.kernel", keys.LINEAR, (0, 2)),
    keys.Row("layers.{layer}.qk.weight", "layers.k.kernel", keys.LINEAR, (1, 2)),
)
SHAPES = {
    "embed": (7, D),
    "layers.up.kernel": (L, D, F),
    "layers.q.kernel": (L, D, 4),
    "layers.k.kernel": (L, D, 4),
}


@dataclasses.dataclass
class Tensor:
    """A tensor that counts how often it is read."""

    array: np.ndarray
    reads: int = 0

    def read(self):
        self.reads += 1
        return self.array


@pytest.fixture
def stored():
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (7, D)}
    for i in range(L):
        shapes |= {f"layers.{i}.up.weight": (F, D), f"layers.{i}.qk.weight": (8, D)}
    return {key: Tensor(rng.normal(size=shape)) for key, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("on_mesh", [False, True])
def test_each_tensor_is_read_into_its_place(stored, dtype, on_mesh):
    places = None
    if on_mesh:
        mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
        places = {path: NamedSharding(mesh, PartitionSpec()) for path in SHAPES}
    slots = keys.slots(SHAPES, TABLE)
    arrays = parameters.read(stored, slots, SHAPES, np.dtype(dtype), places)
    assert {path: array.shape for path, array in arrays.items()} == SHAPES
    assert {array.dtype for array in arrays.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(arrays["embed"], stored["embed.weight"].array.astype(dtype))
    for i in range(L):
        up, qk = (stored[f"layers.{i}.{name}.weight"].array.astype(dtype) for name in ("up", "qk"))
        for d in range(D):
            for f in range(F):
                assert arrays["layers.up.kernel"][i, d, f] == up[f, d]
            for n in range(4):
                assert arrays["layers.q.kernel"][i, d, n] == qk[n, d]
                assert arrays["layers.k.kernel"][i, d, n] == qk[4 + n, d]
    reads = {key: tensor.reads for key, tensor in stored.items()}
    assert reads == {key: 2 if ".qk." in key else 1 for key in stored}
