"""Tiny language models of transformers with random weights, and ours with the same weights."""

from __future__ import annotations

import dataclasses
import functools
import types

import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.checkpoints.networks import decoder
from mllm_jax.families.llava import model as llava
from tests.helpers import hf

torch, transformers = hf.torch, hf.transformers
modeling = transformers.models

SIZE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "pad_token_id": None,
}  # fmt: skip
WIDE = {"head_dim": 16}  # of models that have the field
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
INTERLEAVED = MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


class WithHead(torch.nn.Module):
    """A text model that has no head of its own, with one."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, False)

    def forward(self, **inputs):
        states = self.model(**inputs).last_hidden_state
        return types.SimpleNamespace(logits=self.lm_head(states))


def _qwen2_vl(config):
    return WithHead(modeling.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(config))


def _qwen2_5_vl(config):
    return WithHead(modeling.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel(config))


def _qwen3_vl(config):
    return WithHead(modeling.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel(config))


Q2VL = modeling.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig
Q25VL = modeling.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig
Q3VL = modeling.qwen3_vl.configuration_qwen3_vl.Qwen3VLTextConfig
_GEMMA3 = transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM
_GEMMA2 = transformers.Gemma2Config, transformers.Gemma2ForCausalLM
_LLAMA = transformers.LlamaConfig, transformers.LlamaForCausalLM
_QWEN2 = transformers.Qwen2Config, transformers.Qwen2ForCausalLM
_QWEN3 = transformers.Qwen3Config, transformers.Qwen3ForCausalLM
_WINDOW = {"sliding_window": 4}
_SCALAR = {"query_pre_attn_scalar": 24}

# Name -> the config class, the model and the fields that are not those of SIZE.
MODELS = {
    "llama-bias": (*_LLAMA, WIDE | {"attention_bias": True}),
    "llama-3": (*_LLAMA, {"rope_parameters": LLAMA3}),
    "llama-linear": (
        *_LLAMA,
        {"tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3}},
    ),
    "mistral-window": (
        transformers.MistralConfig, transformers.MistralForCausalLM, WIDE | _WINDOW
    ),
    "qwen2": (*_QWEN2, {"tie_word_embeddings": True}),
    "qwen2-windows": (
        *_QWEN2, {"use_sliding_window": True, "max_window_layers": 1} | _WINDOW,
    ),
    "qwen3": (*_QWEN3, WIDE),
    "qwen3-bias": (*_QWEN3, WIDE | {"attention_bias": True}),
    "qwen2-vl": (Q2VL, _qwen2_vl, {"rope_parameters": MROPE}),
    "qwen2.5-vl": (
        Q25VL, _qwen2_5_vl,
        {"rope_parameters": MROPE, "use_sliding_window": True, "max_window_layers": 1} | _WINDOW,
    ),
    "qwen3-vl": (Q3VL, _qwen3_vl, WIDE | {"rope_parameters": INTERLEAVED}),
    "gemma": (
        transformers.GemmaConfig, transformers.GemmaForCausalLM,
        WIDE | {"tie_word_embeddings": True},
    ),
    "gemma2": (
        *_GEMMA2, WIDE | _WINDOW | _SCALAR
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        *_GEMMA3, WIDE | _WINDOW | _SCALAR | LAYERS | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
}  # fmt: skip


def hf_config(name: str):
    kind, _, fields = MODELS[name]
    return kind(**(SIZE | fields), attn_implementation="eager")


@functools.cache
def pair(name: str):
    """The network of transformers, and a LLaVA of ours with it as its language model."""
    config = hf_config(name)
    theirs = hf.random(MODELS[name][1](config))
    if name.startswith("gemma"):  # their factor is 1 + weight
        with torch.no_grad():
            for key, weight in theirs.named_parameters():
                if "norm" in key:
                    weight.sub_(1)
    problems: list[str] = []
    lm = decoder.config(decoder.read(config.to_dict(), problems, prefix=""))
    assert not problems
    vision = dataclasses.replace(llava.ClipConfig.tiny(), layers=1, feature_layer=-1)
    ours = llava.LlavaConfig.of(vision, lm, fold=2, image_token=95)
    return theirs, hf.transfer(ours, theirs)


def with_mrope(batch: Batch) -> Batch:
    """The batch with a picture of 2 x 3 tokens from the second token of each long row on."""
    rotary = np.zeros((3, *batch.ids.shape), np.int32)
    for row, valid in enumerate(batch.valid):
        places = np.flatnonzero(valid)
        n = len(places)
        text = np.broadcast_to(np.arange(n), (3, n)).copy()
        if n > 8:
            grid = np.stack([np.zeros(6, int), np.arange(6) // 3, np.arange(6) % 3])
            text[:, 1:7] = 1 + grid
            text[:, 7:] = 4 + np.arange(n - 7)
        rotary[:, row, places] = text
    return batch.replace(rotary_position=rotary)


def with_blocks(batch: Batch, ends=((1, 8), (8, 10))) -> Batch:
    """The batch with blocks of tokens, by their places in each row."""
    block = np.zeros(batch.ids.shape, np.int32)
    for number, (start, end) in enumerate(ends):
        block[(batch.position >= start) & (batch.position < end) & batch.valid] = number + 1
    return batch.replace(block=block)


def inputs(batch: Batch, network, kind: str = "") -> dict:
    """The inputs of a network of transformers.

    Args:
      batch: The batch.
      network: The network.
      kind: How transformers makes the mask of blocks: "gemma3" or "paligemma".
    """
    position = batch.position if batch.rotary_position is None else batch.rotary_position
    given = {
        "input_ids": torch.from_numpy(batch.ids.astype(int)),
        "attention_mask": torch.from_numpy(batch.valid.astype(int)),
        "position_ids": torch.from_numpy(position.astype(int)),
    }
    if kind:
        shared = {
            "config": network.config,
            "inputs_embeds": torch.zeros(*batch.ids.shape, network.config.hidden_size),
            "attention_mask": given["attention_mask"],
            "cache": None,
            "position_ids": given["position_ids"],
            "block_sequence_ids": torch.from_numpy(batch.block.astype(int)) - 1,
        }
        masks = transformers.masking_utils
        if kind == "gemma3":
            make = modeling.gemma3.modeling_gemma3.create_masks_for_vision_model
            given["attention_mask"] = make(**shared)
        else:
            given["attention_mask"] = masks.create_causal_mask(**shared)
            if getattr(network.config, "sliding_window", None):
                given["attention_mask"] = {
                    "full_attention": given["attention_mask"],
                    "sliding_attention": masks.create_sliding_window_causal_mask(**shared),
                }
    return given


_PATHS = {
    "lm.resid_pre": ("", "input"),
    "lm.attn.q": ("self_attn.q_proj", "output"),
    "lm.attn.k": ("self_attn.k_proj", "output"),
    "lm.attn.v": ("self_attn.v_proj", "output"),
    "lm.attn.pattern": ("self_attn", "weights"),
    "lm.attn.heads": ("self_attn.o_proj", "input"),
    "lm.attn_out": ("self_attn", "output"),
    "lm.resid_mid": ("post_attention_layernorm", "input"),
    "lm.mlp.input": ("mlp", "input"),
    "lm.mlp.gate": ("mlp.gate_proj", "output"),
    "lm.mlp.act": ("mlp.act_fn", "output"),
    "lm.mlp.gated": ("mlp.down_proj", "input"),
    "lm.mlp.out": ("mlp", "output"),
    "lm.resid_post": ("", "output"),
}
_POST_NORMS = {
    "lm.attn_out": ("post_attention_layernorm", "output"),
    "lm.resid_mid": ("pre_feedforward_layernorm", "input"),
    "lm.mlp.out": ("post_feedforward_layernorm", "output"),
}


def tensors(network, **given) -> dict[str, np.ndarray]:
    """What the network computes at our sites, [L, ...] where it is by layer."""
    post_norms = any("pre_feedforward" in name for name, _ in network.named_modules())
    paths = _PATHS | (_POST_NORMS if post_norms else {})
    modules, found, hooks = dict(network.named_modules()), {}, []

    def watch(module, name, read):
        def hook(module, args, kwargs, out):
            found.setdefault(name, []).append(hf.READ[read](args, kwargs, out).numpy())

        hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    for layer in range(network.config.num_hidden_layers):
        for name, (path, read) in paths.items():
            watch(modules[f"model.layers.{layer}.{path}".removesuffix(".")], name, read)
    watch(modules["model.norm"], "lm.norm", "output")
    with torch.no_grad():
        logits = network(**given).logits.numpy()
    for hook in hooks:
        hook.remove()
    stacked = {name: np.stack(arrays) for name, arrays in found.items() if name != "lm.norm"}
    return stacked | {"lm.norm": found["lm.norm"][0], "logits": logits}
