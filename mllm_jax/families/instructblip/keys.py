"""The key table of InstructBLIP."""

from __future__ import annotations

from mllm_jax.checkpoints import keys
from mllm_jax.checkpoints.networks import decoder
from mllm_jax.families.instructblip.model import InstructBlipConfig

PROJECTOR_PREFIX = "language_projection."

_VISION = keys.rows(
    "vision_model",
    "vision",
    ("embeddings.class_embedding", "cls", keys.CLS_TOKEN),
    ("embeddings.position_embedding", "position", keys.LEADING),
    ("embeddings.patch_embedding.weight", "patch.kernel", keys.PATCHES),
    ("embeddings.patch_embedding.bias", "patch.bias", keys.COPY),
    *keys.norm("post_layernorm", "norm"),
) + keys.rows(
    "vision_model.encoder.layers.{layer}",
    "vision.layers",
    *keys.norm("layer_norm1", "norm1"),
    *keys.linear("self_attn.qkv", "attn.q", (0, 3)),
    *keys.linear("self_attn.qkv", "attn.k", (1, 3)),
    *keys.linear("self_attn.qkv", "attn.v", (2, 3)),
    *keys.linear("self_attn.projection", "attn.o"),
    *keys.norm("layer_norm2", "norm2"),
    *keys.linear("mlp.fc1", "mlp.up"),
    *keys.linear("mlp.fc2", "mlp.down"),
)


_ATTENTION = (
    *keys.linear("attention.query", "q"),
    *keys.linear("attention.key", "k"),
    *keys.linear("attention.value", "v"),
    *keys.linear("output.dense", "o"),
    *keys.norm("output.LayerNorm", "norm"),
)


def _mlp(suffix: str, ours: str) -> tuple[tuple, ...]:
    return (
        *keys.linear(f"intermediate{suffix}.dense", f"{ours}.up"),
        *keys.linear(f"output{suffix}.dense", f"{ours}.down"),
        *keys.norm(f"output{suffix}.LayerNorm", f"{ours}.norm"),
    )


def key_table(config: InstructBlipConfig) -> tuple[keys.Row, ...]:
    """Return the key table of an InstructBLIP model."""
    layer = "qformer.encoder.layer.{layer}"
    return (
        *_VISION,
        keys.Row("query_tokens", "qformer.queries", keys.LEADING),
        *keys.rows(
            "qformer.embeddings",
            "qformer",
            ("word_embeddings.weight", "words", keys.COPY),
            ("position_embeddings.weight", "position", keys.COPY),
            *keys.norm("layernorm", "norm"),
        ),
        *keys.rows(layer, "qformer.layers", *_mlp("", "mlp"), *_mlp("_query", "query_mlp")),
        *keys.rows(f"{layer}.attention", "qformer.layers.attn", *_ATTENTION),
        *keys.rows(
            f"{layer}.crossattention", "qformer.look", *_ATTENTION, every=config.qformer.look_every
        ),
        keys.Row("language_projection.weight", "projector.linears.0.kernel", keys.LINEAR),
        keys.Row("language_projection.bias", "projector.linears.0.bias", keys.COPY),
        *decoder.table(config.lm),
    )


def is_unused(key: str, config: InstructBlipConfig) -> bool:
    """Return whether a checkpoint may hold this tensor although the model does not use it."""
    return decoder.is_unused(key, config.lm)
