"""A study of which one process fails while the other waits for it; see `test_launch`."""

from __future__ import annotations

from experiments.running import command

if __name__ == "__main__":
    command.main("tests.helpers.fails")

from mllm_jax.sharding import hosts


def run(config, workdir) -> None:
    hosts.barrier("start")
    if not hosts.is_primary():
        raise ValueError("the disk of the second host is broken")
    hosts.barrier("end")
