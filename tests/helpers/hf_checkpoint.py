"""Fixtures of models to save and to load; a conftest imports them.

Tests that use a model of transformers are skipped where torch is absent.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from mllm_jax.families.llava import model as llava


@pytest.fixture(scope="session")
def random_model():
    """A function from a config to a model of random numbers, without compiling its initialisers."""

    def build(config: llava.LlavaConfig) -> llava.Llava:
        rng = np.random.default_rng(0)
        abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        return jax.tree.map(
            lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype)), abstract
        )

    return build


@pytest.fixture(scope="session")
def hf_model():
    """A random `LlavaForConditionalGeneration`: 3 vision layers, of which 2 are read."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=24, patch_size=6,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, eos_token_id=7,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=95, image_seq_length=16
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def hf_directory(hf_model, tmp_path_factory):
    """That model as transformers saves it."""
    directory = tmp_path_factory.mktemp("hf")
    hf_model.save_pretrained(directory)
    return directory
