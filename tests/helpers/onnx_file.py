"""A tiny quantised vision tower as an ONNX file."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

LAYER = "vision_model/encoder/layers.0"
PLACES = (f"/{LAYER}/self_attn/q_proj", f"/{LAYER}/mlp/fc1", "/visual_projection")
SHAPES = ((4, 4), (4, 6), (4, 3))  # [in, out]


def parts(*, zero_point: int = 0):
    """INT8 matrices with one scale a column, and one plain bias, of a made-up tower."""
    rng = np.random.default_rng(0)
    stored = {"vision_model.encoder.layers.0.mlp.fc1.bias": rng.normal(size=6).astype(np.float32)}
    nodes, expected = [], dict(stored)
    for n, (place, (rows, columns)) in enumerate(zip(PLACES, SHAPES, strict=True)):
        q = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
        scale = rng.uniform(0.01, 0.1, columns).astype(np.float32)
        name = f"onnx::MatMul_{n}"
        stored[f"{name}_quantized"] = q
        stored[f"{name}_scale"] = scale
        stored[f"{name}_zero_point"] = np.full(columns, zero_point, np.int8)
        inputs = ["x", f"{name}_quantized", "x_zero_point", f"{name}_zero_point"]
        nodes.append(helper.make_node("MatMulInteger", inputs, [f"y{n}"], f"{place}/MatMul_quant"))
        hf = place.strip("/").replace("/", ".") + ".weight"
        expected[hf] = np.array(
            [[q[i, j] * scale[j] for i in range(rows)] for j in range(columns)], np.float32
        )
    return nodes, stored, expected


def write(path, nodes, stored):
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), path)
    return path
