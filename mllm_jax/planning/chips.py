"""Published peak rates of TPU and GPU chips, and the slices in which they are available.

Peak compute in bfloat16, HBM and interconnect of a chip, from the documentation of Cloud TPU:

    v4   https://cloud.google.com/tpu/docs/v4    275 TFLOPs, 32 GiB, 1200 GBps; 6 links of 50
         GBps each way (Jouppi et al. 2023, "TPU v4", table 4)
    v5e  https://cloud.google.com/tpu/docs/v5e   197 TFLOPs, 16 GB, 819 GBps, 400 GBps both ways
    v5p  https://cloud.google.com/tpu/docs/v5p   459 TFLOPs, 95 GB, 2765 GBps, 1200 GBps both ways
    v6e  https://cloud.google.com/tpu/docs/v6e   918 TFLOPs, 32 GB, 1638 GBps, 800 GBps both ways

and of a GPU, from the product pages of NVIDIA (dense products: half of the rates with sparsity):

    h100  https://www.nvidia.com/en-us/data-center/h100/   SXM: 989.5 TFLOPs, 80 GB, 3.35 TB/s,
          NVLink of 900 GB/s both ways
    h200  https://www.nvidia.com/en-us/data-center/h200/   SXM: 989.5 TFLOPs, 141 GB, 4.8 TB/s,
          NVLink of 900 GB/s both ways
    a100  https://www.nvidia.com/en-us/data-center/a100/   SXM: 312 TFLOPs, 80 GB, 2039 GB/s, NVLink
          of 600 GB/s both ways
    l40s  https://www.nvidia.com/en-us/data-center/l40s/   362.05 TFLOPs, 48 GB, 864 GB/s, PCIe of
          64 GB/s both ways

The memory of a GPU is that reported by the driver, which is less than the nominal size.

A chip can receive half of what its links carry in both directions. A slice that is not a torus does
not use all links, so times computed from these figures are lower bounds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      flops: bfloat16 operations per second.
      memory: Bytes of HBM.
      bandwidth: Bytes per second from HBM.
      links: Bytes per second that it can receive from other chips.
      slices: The available topologies, the smallest first; for GPUs their number in one host.
      platform: JAX's name of the platform.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float
    slices: tuple[str, ...]
    platform: Literal["tpu", "cuda"] = "tpu"


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_HOST = ("1", "2", "4", "8")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, _CUBES),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _CUBES),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, _FLAT),
    "h100": Chip(989.5e12, 84942979072, 3352e9, 450e9, _HOST, "cuda"),
    "h200": Chip(989.5e12, int(139.8 * GIB), 4800e9, 450e9, _HOST, "cuda"),
    "a100": Chip(312e12, 85100068864, 2039e9, 300e9, _HOST, "cuda"),
    "l40s": Chip(362.05e12, int(44.4 * GIB), 864e9, 32e9, _HOST, "cuda"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A topology by name, such as `v5e:2x4`, `h100` or `h100:8`."""

    kind: str
    shape: str

    @classmethod
    def parse(cls, name: str) -> Slice:
        """Parse the name of a topology; the name of a GPU without a number is one GPU.

        Raises:
          ValueError: The chip is unknown, or not available in that shape.
        """
        kind, colon, shape = name.partition(":")
        if kind not in CHIPS:
            raise ValueError(f"topology {name!r}: the chips are {', '.join(CHIPS)}")
        if not colon and CHIPS[kind].platform == "cuda":
            shape = "1"
        if shape not in CHIPS[kind].slices:
            known = ", ".join(CHIPS[kind].slices)
            raise ValueError(f"topology {name!r}: the slices of {kind} are {known}")
        return cls(kind, shape)

    @property
    def chip(self) -> Chip:
        """The kind of chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(map(int, self.shape.split("x")))

    def larger(self) -> list[Slice]:
        """Return this slice and the larger ones of the same kind."""
        shapes = self.chip.slices[self.chip.slices.index(self.shape) :]
        return [Slice(self.kind, shape) for shape in shapes]

    def __str__(self) -> str:
        return f"{self.kind}:{self.shape}"
