"""Compile programs for TPU topologies, without the hardware.

The compiler comes with the package `libtpu` and needs no TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mllm_jax.planning.chips import Slice
from mllm_jax.planning.programs import Program

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def has_tpu_compiler() -> bool:
    """Return whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_devices(slice_: Slice) -> list[Any]:
    """Return the chips of a slice as targets of compilation; they need not exist here."""
    # The library would ask the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=str(slice_)).devices


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The findings of the compiler about a program.

    Attributes:
        text: the text of the program; None where the program does not fit.
        temporary: bytes of intermediate arrays.
        results: bytes of results that do not reuse the memory of arguments.
        code: bytes of code.
        used: bytes that a program needs that does not fit.
    """

    text: str | None
    temporary: int = 0
    results: int = 0
    code: int = 0
    used: int = 0


def lower(program: Program, mesh: Mesh) -> jax.stages.Lowered:
    """Lower a program for a mesh; training donates its arguments, as `training.fit` does."""
    args, fn = [tree for _, tree in program.args], program.fn
    if program.back:
        places = jax.tree.map(lambda leaf: leaf.sharding, args[: program.back])
        fn = jax.jit(fn, out_shardings=(*places, None), donate_argnums=tuple(range(program.back)))
    assert isinstance(fn, jax.stages.Wrapped)
    with jax.set_mesh(mesh):
        return fn.lower(*args, **program.static)


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """Compile a program.

    Raises:
        JaxRuntimeError: the compiler refuses it for another reason than its size.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        match = _USED.search(str(error))
        if not match:
            raise
        return Compiled(None, used=int(float(match[1]) * _UNITS[match[2]]))
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler of this platform analyses no memory"
    return Compiled(
        compiled.as_text(),
        temporary=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )
