"""A checkpoint of arrays that are spread over two processes; see `test_checkpoint`."""

from __future__ import annotations

import os
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax.sharding import hosts, mesh
from mllm_jax.training.checkpoint import Checkpoint


def main(folder: str) -> None:
    number, count = (int(os.environ[f"JAX_{name}"]) for name in ("PROCESS_ID", "NUM_PROCESSES"))
    hosts.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)
    values = {"kernel": np.arange(24.0, dtype=np.float32).reshape(4, 6), "count": np.int32(3)}
    over = {"kernel": P("fsdp"), "count": P()}
    places = {n: NamedSharding(mesh.mesh(1, fsdp=count), part) for n, part in over.items()}
    arrays, zeros = (
        {
            name: jax.make_array_from_callback(
                array.shape, places[name], (scale * array).astype(array.dtype).__getitem__
            )
            for name, array in values.items()
        }
        for scale in (1, 0)
    )
    for step in (1, 2):
        checkpoint = Checkpoint(folder, model="m")
        assert checkpoint.find() == (step == 2)
        for item in checkpoint.resume(range(step)):
            checkpoint.add(item)
        checkpoint.save(arrays)
    checkpoint = Checkpoint(folder, model="m")
    assert checkpoint.find()
    for name, array in checkpoint.load(zeros).items():
        assert array.sharding == places[name], name
        for own in array.addressable_shards:
            np.testing.assert_array_equal(own.data, values[name][own.index])
    if hosts.is_primary():
        print("loaded", flush=True)
    hosts.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
