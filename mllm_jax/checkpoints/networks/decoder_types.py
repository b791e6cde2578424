"""The model types of language models: the fields of their `text_config`, and their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema
from mllm_jax.checkpoints.networks import rope
from mllm_jax.models.rotary import RopeSections

_SILU = schema.only("silu", "swish")
_CAP = schema.optional(schema.real(1e-3, 1e6))
_LAYER_TYPES = schema.optional(
    schema.many(schema.only("full_attention", "sliding_attention"), 1, 1024)
)
_COMMON = fields_.TOKEN_IDS | rope.FIELDS | {
    "vocab_size": (schema.WORDS, 32000),
    "hidden_size": (schema.WIDTH, 4096),
    "intermediate_size": (schema.WIDTH, 11008),
    "num_hidden_layers": (schema.LAYERS, 32),
    "num_attention_heads": (schema.HEADS, 32),
    "num_key_value_heads": (schema.optional(schema.HEADS), None),
    "head_dim": (schema.optional(schema.whole(2, 2**14)), None),
    "hidden_act": (_SILU, "silu"),
    "max_position_embeddings": (schema.PLACES, 2048),
    "rms_norm_eps": (schema.EPSILON, 1e-6),
    "tie_word_embeddings": (schema.FLAG, False),
}  # fmt: skip
_NO_WINDOW = {"sliding_window": (schema.only(None), None)}
_BIAS = {"attention_bias": (schema.FLAG, False)}
_LLAMA = _COMMON | _NO_WINDOW | _BIAS | {
    "mlp_bias": (schema.only(False), False),
    # Idefics 3 has kept these from models in which they may be true.
    "qk_layer_norms": (schema.only(False), False),
    "rope_interleaved": (schema.only(False), False),
}  # fmt: skip
_MISTRAL = _COMMON | {
    "intermediate_size": (schema.WIDTH, 14336),
    "num_key_value_heads": (schema.optional(schema.HEADS), 8),
    "max_position_embeddings": (schema.PLACES, 131072),
    "sliding_window": (schema.optional(schema.PLACES), 4096),
}
_QWEN2 = _COMMON | {
    "vocab_size": (schema.WORDS, 151936),
    "intermediate_size": (schema.WIDTH, 22016),
    "num_key_value_heads": (schema.optional(schema.HEADS), 32),
    "max_position_embeddings": (schema.PLACES, 32768),
    "use_sliding_window": (schema.FLAG, False),
    "sliding_window": (schema.optional(schema.PLACES), 4096),
    "max_window_layers": (schema.whole(0, 2**20), 28),
    "layer_types": (_LAYER_TYPES, None),
}
_QWEN3 = _QWEN2 | _BIAS | {"head_dim": (schema.whole(2, 2**14), 128)}
_QWEN2_MROPE = _QWEN2 | {
    "vocab_size": (schema.WORDS, 152064),
    "hidden_size": (schema.WIDTH, 8192),
    "intermediate_size": (schema.WIDTH, 29568),
    "num_hidden_layers": (schema.LAYERS, 80),
    "num_attention_heads": (schema.HEADS, 64),
    "num_key_value_heads": (schema.optional(schema.HEADS), 8),
    "rms_norm_eps": (schema.EPSILON, 1e-5),
    "max_window_layers": (schema.whole(0, 2**20), 80),
}
_QWEN3_MROPE = _COMMON | _NO_WINDOW | _BIAS | {
    "vocab_size": (schema.WORDS, 151936),
    "intermediate_size": (schema.WIDTH, 22016),
    "num_key_value_heads": (schema.optional(schema.HEADS), 32),
    "head_dim": (schema.whole(2, 2**14), 128),
    "max_position_embeddings": (schema.PLACES, 128000),
}  # fmt: skip
_GEMMA = _COMMON | _BIAS | {
    "vocab_size": (schema.WORDS, 256000),
    "hidden_size": (schema.WIDTH, 3072),
    "intermediate_size": (schema.WIDTH, 24576),
    "num_hidden_layers": (schema.LAYERS, 28),
    "num_attention_heads": (schema.HEADS, 16),
    "num_key_value_heads": (schema.optional(schema.HEADS), 16),
    "head_dim": (schema.whole(2, 2**14), 256),
    # The first releases say "gelu" and mean the approximation.
    "hidden_act": (schema.only("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
    "hidden_activation": (schema.only(None, "gelu_pytorch_tanh"), None),
    "max_position_embeddings": (schema.PLACES, 8192),
    "tie_word_embeddings": (schema.FLAG, True),
    "use_bidirectional_attention": (schema.only(None, False), None),
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "hidden_size": (schema.WIDTH, 2304),
    "intermediate_size": (schema.WIDTH, 9216),
    "num_hidden_layers": (schema.LAYERS, 26),
    "num_attention_heads": (schema.HEADS, 8),
    "num_key_value_heads": (schema.optional(schema.HEADS), 4),
    "hidden_act": (fields_.ACTIVATION, "gelu_pytorch_tanh"),  # not read by transformers
    "hidden_activation": (fields_.ACTIVATION, "gelu_pytorch_tanh"),
    "query_pre_attn_scalar": (schema.whole(1, 2**20), 256),
    "sliding_window": (schema.optional(schema.PLACES), 4096),
    "layer_types": (_LAYER_TYPES, None),
    "attn_logit_softcapping": (_CAP, 50.0),
    "final_logit_softcapping": (_CAP, 30.0),
}
_GEMMA_LOCAL = _GEMMA2 | {
    "vocab_size": (schema.WORDS, 262208),
    "max_position_embeddings": (schema.PLACES, 131072),
    "sliding_window_pattern": (schema.whole(1, 1024), 6),
    "rope_local_base_freq": (rope.THETA, None),
    "attn_logit_softcapping": (_CAP, None),  # without effect in transformers
    "final_logit_softcapping": (_CAP, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model type.

    Attributes:
      fields: The fields that are read, with the defaults of transformers.
      theta: The base of the rotary angles if no field has it.
      sections: The sections of mRoPE if no field has them.
      parts: The fields of `DecoderConfig` that the model type determines.
    """

    fields: schema.Table
    theta: float = 1e4
    sections: RopeSections | None = None
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FOUR_NORMS = {"unit_offset": True, "post_norms": True}
_QWEN2_MROPE_MODEL = Model(
    fields=_QWEN2_MROPE, theta=1e6, sections=RopeSections((16, 24, 24)), parts={"biases": "qkv"}
)
MODELS = {
    "llama": Model(fields=_LLAMA),
    "mistral": Model(fields=_MISTRAL),
    "qwen2": Model(fields=_QWEN2, parts={"biases": "qkv"}),
    "qwen3": Model(fields=_QWEN3, parts={"qk_norm": True}),
    "qwen2_vl_text": _QWEN2_MROPE_MODEL,
    "qwen2_5_vl_text": _QWEN2_MROPE_MODEL,
    "qwen3_vl_text": Model(
        fields=_QWEN3_MROPE,
        theta=5e5,
        sections=RopeSections((24, 20, 20), interleaved=True),
        parts={"qk_norm": True},
    ),
    "gemma": Model(fields=_GEMMA, parts={"unit_offset": True}),
    "gemma2": Model(fields=_GEMMA2, parts=_FOUR_NORMS | {"window_within_block": False}),
    "gemma3_text": Model(fields=_GEMMA_LOCAL, theta=1e6, parts=_FOUR_NORMS | {"qk_norm": True}),
}
