"""What chips can do by their makers' word, and the slices that they are sold in.

Peak compute in bfloat16, HBM and interconnect of a chip, from the pages of Cloud TPU:

    v4   https://cloud.google.com/tpu/docs/v4    275 TFLOPs, 32 GiB, 1200 GBps; 6 links of 50
         GBps each way (Jouppi et al. 2023, "TPU v4", table 4)
    v5e  https://cloud.google.com/tpu/docs/v5e   197 TFLOPs, 16 GB, 819 GBps, 400 GBps both ways
    v5p  https://cloud.google.com/tpu/docs/v5p   459 TFLOPs, 95 GB, 2765 GBps, 1200 GBps both ways
    v6e  https://cloud.google.com/tpu/docs/v6e   918 TFLOPs, 32 GB, 1638 GBps, 800 GBps both ways

What a chip can receive is half of what its links carry both ways. A slice that is no torus does not
use all links, so times from these figures are lower bounds.
"""

from __future__ import annotations

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes of HBM.
      bandwidth: bytes a second from HBM.
      links: bytes a second that it can receive from other chips.
      slices: the topologies that one can have, the smallest first.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, _CUBES),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _CUBES),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A topology by name, `v5e:2x4`."""

    kind: str
    shape: str

    @classmethod
    def parse(cls, name: str) -> Slice:
        """Reads the name of a topology.

        Raises:
          ValueError: no chip is called so, or it is not sold in that shape.
        """
        kind, _, shape = name.partition(":")
        if kind not in CHIPS:
            raise ValueError(f"topology {name!r}: the chips are {', '.join(CHIPS)}")
        if shape not in CHIPS[kind].slices:
            known = ", ".join(CHIPS[kind].slices)
            raise ValueError(f"topology {name!r}: the slices of {kind} are {known}")
        return cls(kind, shape)

    @property
    def chip(self) -> Chip:
        """Return the kind of chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Return the number of chips."""
        return math.prod(map(int, self.shape.split("x")))

    def larger(self) -> list[Slice]:
        """This slice and those of more chips, of the same kind."""
        shapes = self.chip.slices[self.chip.slices.index(self.shape) :]
        return [Slice(self.kind, shape) for shape in shapes]

    def __str__(self) -> str:
        return f"{self.kind}:{self.shape}"
