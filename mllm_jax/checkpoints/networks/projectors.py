"""The key tables of projectors; `ProjectorConfig` has a constructor for each."""

from __future__ import annotations

from mllm_jax.checkpoints import keys

_TWO = (*keys.linear("linear_1", "linears.0"), *keys.linear("linear_2", "linears.1"))


def linears(hf: str, ours: str, depth: int = 2) -> tuple[keys.Row, ...]:
    """Return the key table of LLaVA's stack of linear maps, which HF counts from 1."""
    lines = (keys.linear(f"linear_{n + 1}", f"linears.{n}") for n in range(depth))
    return keys.rows(hf, ours, *(line for pair in lines for line in pair))


def linear(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of PaliGemma's linear map."""
    return keys.rows(hf, ours, *keys.linear("linear", "linears.0"))


def pooled(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of Gemma 3's projector, whose matrix is stored [in, out]."""
    return keys.rows(
        hf,
        ours,
        ("mm_soft_emb_norm.weight", "norm.scale", keys.COPY),
        ("mm_input_projection_weight", "linears.0.kernel", keys.COPY),
    )


def shuffled(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of InternVL's projector."""
    return keys.rows(hf, ours, *keys.norm("layer_norm", "norm"), *_TWO)


def merging(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of a projector with a patch merger (Mistral 3)."""
    merge = keys.linear("patch_merger.merging_layer", "merge")
    return keys.rows(hf, ours, *keys.norm("norm", "norm"), *merge, *_TWO)


def qwen2(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of the merger of Qwen2-VL and Qwen2.5-VL, under that of the tower."""
    return keys.rows(
        f"{hf}.merger",
        ours,
        *keys.norm("ln_q", "norm"),
        *keys.linear("mlp.0", "linears.0"),
        *keys.linear("mlp.2", "linears.1"),
    )


def qwen3(hf: str, ours: str) -> tuple[keys.Row, ...]:
    """Return the key table of the mergers of Qwen3-VL, under that of the tower."""
    lines = (
        *keys.norm("norm", "norm"),
        *keys.linear("linear_fc1", "linears.0"),
        *keys.linear("linear_fc2", "linears.1"),
    )
    return keys.rows(f"{hf}.merger", ours, *lines) + keys.rows(
        f"{hf}.deepstack_merger_list.{{layer}}", f"{ours}.deepstack", *lines
    )
