"""A study of many small steps, in which all processes take part; see `test_kills`."""

from __future__ import annotations

from experiments.running import command

if __name__ == "__main__":
    command.main("tests.helpers.slowly", rows={"batch_size": 1})

import time

import numpy as np

from mllm_jax import store
from mllm_jax.sharding import hosts

STEPS = 40


def run(config, workdir: store.Workdir) -> None:
    total = 0
    for number in range(STEPS):
        total += int(workdir.arrays(f"step-{number}", lambda number=number: step(number))["sum"])
    store.atomic_json(workdir / "results.json", {"total": total})


def step(number: int) -> dict[str, np.ndarray]:
    time.sleep(0.1)
    return {"sum": np.int64(hosts.broadcast_from_primary(number**2))}
