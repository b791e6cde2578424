"""Reads a CLIP vision tower out of a dynamically quantised INT8 ONNX file.

Each matrix is stored as INT8 with one scale per output column; the values come back as float32,
`W = q * scale`. They are 8-bit values, not the original checkpoint.
"""

from __future__ import annotations

import pathlib

import google.protobuf.message
import numpy as np
import onnx
import tqdm
from onnx import numpy_helper

_QUANTISED = "/MatMul_quant"


def read(path: str | pathlib.Path, *, progress: bool = False) -> dict[str, np.ndarray]:
    """Reads and dequantises the vision tower.

    Args:
        path: the `.onnx` file.
        progress: whether to show a bar over the tensors.

    Returns:
        HF `CLIPVisionModelWithProjection` key -> float32 array: `vision_model.*` and, where the
        file has it, `visual_projection.weight`. Linear weights are [out, in].

    Raises:
        ValueError: the file is not ONNX, is cut short, or is quantised in another way.
    """
    try:
        graph = onnx.load(path).graph
    except google.protobuf.message.DecodeError as error:
        raise ValueError(f"{path}: not a readable ONNX file ({error}); fetch it again") from error
    stored = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    plain = [name for name in stored if name.startswith("vision_model.")]
    if not plain:
        raise ValueError(f"{path}: no tensor named vision_model.*, so no CLIP vision tower")
    tensors = {}
    with tqdm.tqdm(
        total=len(plain) + len(products), desc="reading the vision encoder", disable=not progress
    ) as bar:
        for name in plain:
            tensors[name] = numpy_helper.to_array(stored[name]).astype(np.float32)
            bar.update()
        for node in products:
            tensors[_hf_name(node.name, path)] = _dequantise(node, stored, path)
            bar.update()
    return tensors


def _hf_name(node: str, path: str | pathlib.Path) -> str:
    if not node.endswith(_QUANTISED):
        raise ValueError(f"{path}: node {node!r} does not name the weight it multiplies by")
    return node.removesuffix(_QUANTISED).strip("/").replace("/", ".") + ".weight"


def _dequantise(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], path: str | pathlib.Path
) -> np.ndarray:
    """INT8 [in, out] times scale [out] -> float32 [out, in]."""
    _, weight, _, zero_point = node.input
    scale = weight.removesuffix("_quantized") + "_scale"
    for name in (weight, zero_point, scale):
        if name not in stored:
            raise ValueError(f"{path}: node {node.name!r} needs the missing tensor {name!r}")
    if numpy_helper.to_array(stored[zero_point]).any():
        raise ValueError(f"{path}: {weight!r} is not quantised symmetrically (zero point not 0)")
    quantised = numpy_helper.to_array(stored[weight]).astype(np.float32)
    return np.ascontiguousarray((quantised * numpy_helper.to_array(stored[scale])).T)
