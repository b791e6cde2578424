from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.checkpoints import read_onnx
from tests.helpers.onnx_file import parts, write


def test_dequantised_under_hf_names(tmp_path):
    nodes, stored, expected = parts()
    read = read_onnx.read(write(tmp_path / "tiny.onnx", nodes, stored))
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        assert read[key].dtype == np.float32
        np.testing.assert_allclose(read[key], value, rtol=1e-6, err_msg=key)


def test_bad_files(tmp_path):
    nodes, stored, _ = parts()
    whole = write(tmp_path / "whole.onnx", nodes, stored).read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.onnx: not a readable ONNX"):
        read_onnx.read(cut)
    skewed, values, _ = parts(zero_point=3)
    with pytest.raises(ValueError, match="not quantised symmetrically"):
        read_onnx.read(write(tmp_path / "skewed.onnx", skewed, values))
    with pytest.raises(ValueError, match="not a CLIP vision tower"):
        read_onnx.read(write(tmp_path / "other.onnx", [], {"weight": np.ones(3, np.float32)}))
    del stored["onnx::MatMul_1_scale"]
    with pytest.raises(ValueError, match="missing tensor 'onnx::MatMul_1_scale'"):
        read_onnx.read(write(tmp_path / "part.onnx", nodes, stored))
