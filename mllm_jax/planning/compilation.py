"""Compile programs for TPU and GPU topologies, without the hardware.

The compiler for TPUs comes with the package `libtpu` and needs no TPU. The compiler for GPUs comes
with JAX's plugin for CUDA and needs no GPU and no driver, but the assembler `ptxas`, NVIDIA's
library of device functions and cuDNN, from a CUDA toolkit or from packages.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import warnings
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mllm_jax.models import cudnn_attention
from mllm_jax.planning import gpu_targets
from mllm_jax.planning.chips import Slice
from mllm_jax.planning.programs import Program

CompilerOptions = dict[str, str | bool]
# The two ways in which the compiler for TPUs says that a program is too large.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_TEMPORARY = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOOLS = re.compile(r"libdevice|ptxas")  # parts of the compiler for GPUs, by its messages
_GPU_PACKAGES = "pip install 'mllm-jax[plan-gpu]', or plan from shapes (compile=False, --shapes)"


def has_tpu_compiler() -> bool:
    """Return whether the compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Return whether the compiler for GPUs is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def has_compiler(slice_: Slice) -> bool:
    """Return whether there is a compiler for a slice.

    Raises:
      ValueError: The compiler for GPUs, or cuDNN, is not installed. (Without the compiler for TPUs
        a plan is made from shapes.)
    """
    if slice_.chip.platform == "tpu":
        return has_tpu_compiler()
    if not has_gpu_compiler():
        raise ValueError(f"topology '{slice_}': the compiler for GPUs is missing: {_GPU_PACKAGES}")
    if not cudnn_attention.is_available():  # a GPU would run another program
        raise ValueError(f"topology '{slice_}': cuDNN is missing: {_GPU_PACKAGES}")
    return True


def topology_devices(slice_: Slice) -> list[Any]:
    """Return the chips of a slice as targets of compilation; they need not exist here."""
    if slice_.chip.platform == "cuda":
        # The plugin would report on each start that it finds no driver.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
        return topologies.get_topology_desc(
            platform="cuda",
            target_config=gpu_targets.target_config(slice_.kind),
            topology=f"1x1x{slice_.chips}",
        ).devices
    # The library would ask the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=str(slice_)).devices


def topology_options(slice_: Slice) -> CompilerOptions:
    """Return the compiler options for chips that are absent, so that nothing can be timed."""
    return {"xla_gpu_autotune_level": "0"} if slice_.chip.platform == "cuda" else {}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The findings of the compiler about a program.

    Attributes:
      text: The text of the program; None if the program does not fit.
      temporary: Bytes of intermediate arrays, if they are known.
      results: Bytes of results that do not reuse the memory of arguments.
      code: Bytes of code.
      used: Bytes that a program needs that does not fit, if they are known.
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


def compile_lowered(
    lowered: jax.stages.Lowered, options: CompilerOptions | None = None
) -> Compiled:
    """Compile a program.

    Args:
      lowered: The program, as `lower` returns it.
      options: The options of the compiler, see `topology_options`.

    Raises:
      ValueError: A part of the compiler is not installed.
      JaxRuntimeError: The compiler refuses it for another reason than its size.
    """
    try:
        with warnings.catch_warnings():
            # The cache cannot hold programs that are compiled for absent chips.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if missing := _TOOLS.search(str(error)):
            raise ValueError(
                f"the compiler for GPUs does not find {missing[0]}: {_GPU_PACKAGES}"
            ) from error
        used, temporary = (_bytes(said, str(error)) for said in (_USED, _TEMPORARY))
        if not used and not temporary:
            raise
        return Compiled(None, used=used, temporary=temporary)
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler of this platform has no memory analysis"
    return Compiled(
        compiled.as_text(),
        temporary=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def _bytes(said: re.Pattern, message: str) -> int:
    """Return the bytes that a message names, 0 for none."""
    match = said.search(message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0
