"""Read a CLIP vision tower from a dynamically quantised INT8 ONNX file.

Each matrix is stored as INT8 with one scale for each output column, and read as float32,
`W = q * scale`. These are 8-bit values, not those of the original checkpoint.
"""

from __future__ import annotations

import pathlib
import re

import numpy as np
import onnx
import tqdm
from onnx import numpy_helper

from mllm_jax import files
from mllm_jax.checkpoints.networks import clip

_QUANTISED = "/MatMul_quant"


def read(path: str | pathlib.Path, *, progress: bool = False) -> dict[str, np.ndarray]:
    """Read and dequantise the vision tower.

    Args:
      path: The `.onnx` file.
      progress: Whether to show a progress bar.

    Returns:
      float32 arrays by key of `CLIPVisionModelWithProjection`: `vision_model.*` and, if the file
      has it, `visual_projection.weight`. Linear weights are [out, in].

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: The file is not ONNX, is truncated, or is quantised in another way.
    """
    path = files.regular(path)
    try:
        return _read(path, progress)
    except _Unsupported as error:
        raise ValueError(files.refusal(path, [error])) from error
    except Exception as error:  # protobuf and NumPy can raise anything for a damaged file
        reason = files.line(str(error) or type(error).__name__, 120)
        raise ValueError(
            files.refusal(path, [f"not a readable ONNX file ({reason}); fetch it again"])
        ) from error


class _Unsupported(Exception):
    """The file is valid ONNX of an unsupported model."""


def _read(path: pathlib.Path, progress: bool) -> dict[str, np.ndarray]:
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    if len(stored) < len(graph.initializer):
        raise ValueError("a tensor occurs twice")
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    used = {name for node in products for name in node.input}
    if idle := [name for name in stored if name.endswith("_quantized") and name not in used]:
        raise ValueError(f"no node uses {files.some(idle)}")
    plain = [name for name in stored if name.startswith("vision_model.")]
    if not plain:
        raise _Unsupported("no tensor is named vision_model.*: this is not a CLIP vision tower")
    tensors = {}
    with tqdm.tqdm(
        total=len(plain) + len(products), desc="reading the vision encoder", disable=not progress
    ) as bar:
        for name in plain:
            tensors[name] = _array(stored[name]).astype(np.float32)
            bar.update()
        for node in products:
            name = _hf_name(node.name)
            if name in tensors:
                raise ValueError(f"{name} occurs twice")
            tensors[name] = _dequantise(node, stored)
            bar.update()
    _check_names(tensors)
    return tensors


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    """Return a tensor that is stored in the file itself."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise _Unsupported(f"{files.shown(tensor.name)} is in another file, which is not read")
    return numpy_helper.to_array(tensor)


_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")


def _check_names(tensors: dict[str, np.ndarray]) -> None:
    """Refuse names that are not those of a CLIP tower, and layers with different tensors."""
    known = {row.key for row in clip.vision("vision_model", "")} | {
        "vision_model.post_layernorm.weight",
        "vision_model.post_layernorm.bias",
        "vision_model.embeddings.position_ids",
        "visual_projection.weight",
    }
    layers: dict[str, set[str]] = {}
    for name in tensors:
        match = _LAYER.fullmatch(name)
        row = name if match is None else f"vision_model.encoder.layers.{{layer}}.{match[2]}"
        if row not in known:
            raise ValueError(f"{files.line(name, 80)} is not a tensor of a CLIP vision tower")
        if match:
            layers.setdefault(match[1], set()).add(match[2])
    whole = set().union(*layers.values())
    if layers.keys() != set(map(str, range(len(layers)))) or any(
        parts != whole for parts in layers.values()
    ):
        raise ValueError("the layers of the tower do not have the same tensors")


def _hf_name(node: str) -> str:
    if not node.endswith(_QUANTISED):
        raise _Unsupported(f"node {files.shown(node)} does not name the weight it multiplies by")
    return node.removesuffix(_QUANTISED).strip("/").replace("/", ".") + ".weight"


def _dequantise(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> np.ndarray:
    """Return float32[out, in] = (INT8[in, out] * scale[out])^T."""
    _, weight, _, zero_point = node.input
    scale = weight.removesuffix("_quantized") + "_scale"
    for name in (weight, zero_point, scale):
        if name not in stored:
            raise _Unsupported(
                f"node {files.shown(node.name)} needs the missing tensor {files.shown(name)}"
            )
    if _array(stored[zero_point]).any():
        raise _Unsupported(
            f"{files.shown(weight)} is not quantised symmetrically (zero point not 0)"
        )
    quantised, scales = _array(stored[weight]), _array(stored[scale])
    if quantised.ndim != 2 or scales.shape not in ((), (1,), quantised.shape[1:]):
        raise ValueError(f"{files.shown(weight)} has scales of shape {scales.shape}")
    return np.ascontiguousarray((quantised.astype(np.float32) * scales).T)
