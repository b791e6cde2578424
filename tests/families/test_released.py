"""Released sizes have as many parameters as was published."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax import families
from mllm_jax.planning import programs

PUBLISHED = {  # of the files on the hub
    "paligemma-3b": 2_923_466_480,
    # Without the last 64 words, which are padding.
    "paligemma2-3b": 3_032_094_960 + 64 * 2304,
    "paligemma2-10b": 9_662_409_456 + 64 * 3584,
    "paligemma2-28b": 27_650_192_112 + 64 * 4608,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "internvl3-1b": 938_193_024,  # that of InternVL 2.5, of the same parts
    "internvl3-38b": 38_388_164_992,  # likewise
    "smolvlm-256m": 256_484_928,
    "smolvlm2-2.2b": 2_246_784_880,
    "mistral-small-3.1-24b": 24_011_361_280,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    model = programs.abstract_model(families.RELEASED[name](), np.float32)
    count = sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(model))
    assert count == PUBLISHED[name]
