"""The key table of LLaVA-NeXT: that of LLaVA with the newline."""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.families.llava import keys as llava
from mllm_jax.families.llava_next.model import LlavaNextConfig


def key_table(config: LlavaNextConfig) -> tuple[keys.Row, ...]:
    """Return the key table of a LLaVA-NeXT model."""
    return (*llava.key_table(config), keys.Row("image_newline", "newline", keys.COPY))
