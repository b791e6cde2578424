"""Describe GPUs to the compiler, so that it needs no hardware.

The figures are those that the driver reports for a device; the compiler chooses tiles and counts
memory by them.
"""

from __future__ import annotations

import dataclasses

from mllm_jax.planning.chips import CHIPS

_TEMPLATE = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: {threads_per_core}
  core_count: {cores}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_memory_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """The properties of a GPU by which the compiler chooses.

    Attributes:
      name: The name that the driver gives it.
      major: The first number of its compute capability.
      minor: The second number.
      cores: The number of streaming multiprocessors.
      fpus_per_core: The float32 units of each.
      threads_per_core: The threads that each holds.
      shared_memory_per_core: Bytes of its shared memory.
      shared_memory_per_block: The largest number of these bytes that a block may use.
      l2_cache: Bytes of the L2 cache.
      clock_ghz: The highest clock rate.
    """

    name: str
    major: int
    minor: int
    cores: int
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_cache: int
    clock_ghz: float


_MIB = 2**20
TARGETS = {
    "h100": GpuTarget(
        "NVIDIA H100 80GB HBM3", 9, 0, 132, 128, 2048, 233472, 232448, 50 * _MIB, 1.98
    ),
    "h200": GpuTarget(
        "NVIDIA H200 141GB HBM3e", 9, 0, 132, 128, 2048, 233472, 232448, 50 * _MIB, 1.98
    ),
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB", 8, 0, 108, 64, 2048, 167936, 166912, 40 * _MIB, 1.41
    ),
    "l40s": GpuTarget("NVIDIA L40S", 8, 9, 142, 128, 1536, 102400, 101376, 96 * _MIB, 2.52),
}


def target_config(kind: str) -> str:
    """Return the description of a GPU as the text that the compiler reads.

    Args:
      kind: The name of the chip in `chips.CHIPS`.
    """
    chip = CHIPS[kind]
    return _TEMPLATE.format(
        memory=chip.memory,
        memory_bandwidth=int(chip.bandwidth),
        **dataclasses.asdict(TARGETS[kind]),
    )
