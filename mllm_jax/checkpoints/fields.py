"""Fields that all `config.json` files share, and the error for a refused config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mllm_jax import files
from mllm_jax.checkpoints import schema

Config = TypeVar("Config")

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
HF_ACTIVATIONS = {ours: hf for hf, ours in ACTIVATIONS.items()}
ACTIVATION = schema.only(*sorted(ACTIVATIONS))
PINPOINTS = schema.optional(schema.many(schema.many(schema.whole(1, 2**16), 2, 2), 1, 256))

TOKEN_IDS = dict.fromkeys(
    ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"), (schema.IDS, None)
)

# Fields that do not change what a trained model computes.
IGNORED = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map dropout
    dtype ignore_index image_seq_length initializer_factor initializer_range max_position_embeddings
    max_sequence_length name_or_path pretraining_tp projection_dim torch_dtype transformers_version
    use_cache use_image_newline_parameter

    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id

    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_composition is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript typical_p use_bfloat16
    """.split()  # noqa: SIM905 (70 quoted words would be no easier to read)
)


class Refused(ValueError):
    """A refused `config.json`.

    Attributes:
      config: The config without the unknown fields, so that the tensors can be checked as well;
        None if something else is wrong.
    """

    def __init__(self, source: object, problems: list[str], config: Any = None):
        super().__init__(files.refusal(source, problems))
        self.config = config


def checked(config: Callable[[], Config], source: object, problems: list[str]) -> Config:
    """Return the config if nothing is wrong with it.

    Args:
      config: A function that makes the config.
      source: The name of the file, for the error.
      problems: Descriptions of what is wrong with the fields.

    Raises:
      Refused: There are problems.
    """
    if not all(isinstance(problem, schema.Unknown) for problem in problems):
        raise Refused(source, problems)
    if problems:
        raise Refused(source, problems, config())
    return config()


def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the older name of the image token, which transformers 5 renamed."""
    fields = dict(fields)
    if "image_token_id" in fields:
        fields.setdefault("image_token_index", fields.pop("image_token_id"))
    return fields
