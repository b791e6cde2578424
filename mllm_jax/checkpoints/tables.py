"""Key tables: which Hugging Face tensor is which of our parameters, and how its axes are turned.

Our parameters are named by dotted path (`lm.layers.attn.q.kernel`); those of layers are stacked on
a leading axis L. Hugging Face tensors are named in one canonical spelling, that of the LLaVA files
on the hub, which transformers 4 and 5 both read; `canonical` brings the other spellings to it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from mllm_jax.checkpoints import files
from mllm_jax.families.llava.model import LlavaConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How the axes of one tensor are turned, from Hugging Face to us and back."""

    name: str
    ours: Callable[[np.ndarray], np.ndarray]
    hf: Callable[[np.ndarray], np.ndarray]


def _patches_from_conv(weight: np.ndarray) -> np.ndarray:
    """[E, 3, row, column] -> [row * column * 3, E]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def _conv_from_patches(kernel: np.ndarray) -> np.ndarray:
    pixels, width = kernel.shape
    side = math.isqrt(pixels // 3)
    return kernel.reshape(side, side, 3, width).transpose(3, 2, 0, 1)


COPY = Transform("copy", lambda x: x, lambda x: x)
LINEAR = Transform("linear", np.transpose, np.transpose)  # [out, in] <-> [in, out]
PATCHES = Transform("patches", _patches_from_conv, _conv_from_patches)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        key: Hugging Face key, with `{layer}` where it has a layer number.
        path: our path.
        transform: how the axes are turned.
        part: (number, count) where the tensor is several of ours, one after the other on its first
            axis.
        every: what our layer number is multiplied with to give theirs.
    """

    key: str
    path: str
    transform: Transform
    part: tuple[int, int] = (0, 1)
    every: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """A place of one Hugging Face tensor in our parameters.

    Attributes:
        key: Hugging Face key.
        path: our path. layer: index on its L axis, or None when it has none.
        shape: the shape of the Hugging Face tensor.
        transform: how the axes are turned.
        part: which part of the tensor it is, see `Row`.
    """

    key: str
    path: str
    layer: int | None
    shape: Shape
    transform: Transform
    part: tuple[int, int] = (0, 1)

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """What stands here, of a Hugging Face tensor."""
        number, count = self.part
        return self.transform.ours(tensor if count == 1 else np.split(tensor, count)[number])


def rows(hf: str, ours: str, *table: tuple, every: int = 1) -> tuple[Row, ...]:
    """Rows under a prefix; a line of the table is (key, path, transform), or with a part."""
    return tuple(
        Row(f"{hf}.{key}", f"{ours}.{path}", *rest, every=every) for key, path, *rest in table
    )


def linear(hf: str, ours: str, *part: tuple[int, int]) -> tuple[tuple, ...]:
    """The lines of a linear map."""
    weight = (f"{hf}.weight", f"{ours}.kernel", LINEAR, *part)
    return weight, (f"{hf}.bias", f"{ours}.bias", COPY, *part)


def norm(hf: str, ours: str) -> tuple[tuple, ...]:
    """The lines of a layer norm."""
    return (f"{hf}.weight", f"{ours}.scale", COPY), (f"{hf}.bias", f"{ours}.bias", COPY)


_CLIP_LAYER = (
    *norm("layer_norm1", "norm1"),
    *linear("self_attn.q_proj", "attn.q"),
    *linear("self_attn.k_proj", "attn.k"),
    *linear("self_attn.v_proj", "attn.v"),
    *linear("self_attn.out_proj", "attn.o"),
    *norm("layer_norm2", "norm2"),
    *linear("mlp.fc1", "mlp.up"),
    *linear("mlp.fc2", "mlp.down"),
)


def clip_layers(hf: str, ours: str) -> tuple[Row, ...]:
    """The table of the layers of a CLIP tower, of either kind."""
    return rows(f"{hf}.encoder.layers.{{layer}}", f"{ours}.layers", *_CLIP_LAYER)


def clip_vision(hf: str, ours: str) -> tuple[Row, ...]:
    """The table of a CLIP vision tower, up to its last layer."""
    embeddings = rows(
        hf,
        ours,
        ("embeddings.class_embedding", "cls", COPY),
        ("embeddings.patch_embedding.weight", "patch.kernel", PATCHES),
        ("embeddings.position_embedding.weight", "position", COPY),
        *norm("pre_layrnorm", "pre_norm"),  # the key is spelled so
    )
    return embeddings + clip_layers(hf, ours)


CLIP = clip_vision("vision_tower.vision_model", "vision")

NEWLINE = (Row("image_newline", "newline", COPY),)  # of LLaVA-NeXT

LLAMA = rows(
    "language_model",
    "lm",
    ("model.embed_tokens.weight", "embed", COPY),
    ("model.norm.weight", "norm.scale", COPY),
    ("lm_head.weight", "head.kernel", LINEAR),
) + rows(
    "language_model.model.layers.{layer}",
    "lm.layers",
    ("input_layernorm.weight", "attn_norm.scale", COPY),
    ("self_attn.q_proj.weight", "attn.q.kernel", LINEAR),
    ("self_attn.k_proj.weight", "attn.k.kernel", LINEAR),
    ("self_attn.v_proj.weight", "attn.v.kernel", LINEAR),
    ("self_attn.o_proj.weight", "attn.o.kernel", LINEAR),
    ("post_attention_layernorm.weight", "mlp_norm.scale", COPY),
    ("mlp.gate_proj.weight", "mlp.gate.kernel", LINEAR),
    ("mlp.up_proj.weight", "mlp.up.kernel", LINEAR),
    ("mlp.down_proj.weight", "mlp.down.kernel", LINEAR),
)


def projector(depth: int) -> tuple[Row, ...]:
    """The table of a projector of `depth` linear maps; HF counts them from 1."""
    lines = (linear(f"linear_{n + 1}", f"linears.{n}") for n in range(depth))
    return rows("multi_modal_projector", "projector", *(line for pair in lines for line in pair))


def llava(config: LlavaConfig) -> tuple[Row, ...]:
    """The table of a LLaVA or LLaVA-NeXT model."""
    return CLIP + projector(config.projector.depth) + NEWLINE + LLAMA


def slots(shapes: Mapping[str, Shape], table: Iterable[Row]) -> list[Slot]:
    """The place of every tensor of a model.

    Args:
        shapes: our path -> shape, of all parameters, L axis included.
        table: of its architecture. Rows of parameters that the model does not have (a tied head,
            biases) fall away.

    Returns:
        The slots, those of one path next to each other.
    """
    table = [row for row in table if row.path in shapes]
    if unknown := set(shapes) - {row.path for row in table}:
        raise ValueError(f"parameters without a row in the key tables: {sorted(unknown)}")
    return [slot for row in table for slot in _slots(row, shapes[row.path])]


def _slots(row: Row, shape: Shape) -> list[Slot]:
    stacked = "{layer}" in row.key
    whole = row.transform.hf(np.broadcast_to(np.int8(0), shape[1:] if stacked else shape)).shape
    if row.part[1] > 1:
        whole = (whole[0] * row.part[1], *whole[1:])
    return [
        Slot(
            key=row.key.format(layer=layer * row.every) if stacked else row.key,
            path=row.path,
            layer=layer if stacked else None,
            shape=whole,
            transform=row.transform,
            part=row.part,
        )
        for layer in range(shape[0] if stacked else 1)
    ]


_SPELLINGS = (  # the first prefix that fits
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),  # original
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # late transformers 4
    ("model.vision_tower.", "vision_tower.vision_model."),  # transformers 5 in memory
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # the hub
    ("vision_tower.", "vision_tower.vision_model."),  # transformers 5 on disk
    ("model.image_newline", "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),  # original
)
WRAPPED = "base_model.model."  # before the keys of a model that PEFT has wrapped
_ORIGINAL_PROJECTOR = re.compile(r"(?:.+\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_WRAPPED_PROJECTOR = re.compile(r".+\.((?:multi_modal_projector|language_projection)\..*)")
_PROJECTOR = re.compile(r"multi_modal_projector\.linear_(\d+)\.(weight|bias)")
_TOWER = re.compile(r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)")
_OF_TEXT = re.compile(r"text_model\..*|(text_projection|visual_projection)\.weight|logit_scale")


def canonical(key: str) -> str:
    """The canonical spelling of a Hugging Face or original-LLaVA key; others come back as they are.

    Original LLaVA (Liu et al. 2023) numbers the modules of its projector, activations included:
    `model.mm_projector.0`, `.2`, or no number when it is one linear map. Whatever trained a model
    may have put a prefix before its keys.
    """
    key = key.removeprefix(WRAPPED)
    if match := _ORIGINAL_PROJECTOR.fullmatch(key):
        number, kind = match.groups()
        return f"multi_modal_projector.linear_{int(number or 0) // 2 + 1}.{kind}"
    if match := _WRAPPED_PROJECTOR.fullmatch(key):
        return match[1]
    for prefix, spelling in _SPELLINGS:
        if key.startswith(prefix):
            return spelling + key.removeprefix(prefix)
    return key


def original_projector(keys: Iterable[str]) -> dict[str, str]:
    """Canonical key -> key in the original code, of all tensors of a projector."""
    matches = {key: _PROJECTOR.fullmatch(key) for key in keys}
    if other := [key for key, match in matches.items() if not match]:
        raise ValueError(f"the original LLaVA code has no name for {files.some(other)}")
    found = {key: match.groups() for key, match in matches.items()}
    one = {number for number, _ in found.values()} == {"1"}
    return {
        key: f"model.mm_projector.{kind}" if one else f"model.mm_projector.{2 * int(n) - 2}.{kind}"
        for key, (n, kind) in found.items()
    }


def of_tower(key: str) -> str | None:
    """The canonical spelling of a key of a CLIP checkpoint; None for what LLaVA has no use for."""
    if match := _TOWER.fullmatch(key):
        return f"vision_tower.vision_model.{match[1]}"
    return None if _OF_TEXT.fullmatch(key) else key


_BUFFER = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)")
_VISION_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\..*")
EMBEDDING = "language_model.model.embed_tokens.weight"
TIED_HEAD = "language_model.lm_head.weight"


def unused(key: str, config: LlavaConfig | None) -> bool:
    """Whether a checkpoint may hold this tensor although the model does not.

    Args:
        key: in canonical spelling.
        config: of the model; None of one that is read whole.

    Returns:
        True for buffers, for what comes after the vision layer that is read, and for the second
        copy of a tied embedding.
    """
    if config is None:
        return bool(_BUFFER.fullmatch(key))
    if match := _VISION_LAYER.fullmatch(key):
        return config.vision.run_layers <= int(match[1]) < config.vision.layers
    return bool(
        _BUFFER.fullmatch(key)
        or key.startswith("vision_tower.vision_model.post_layernorm.")
        or (config.lm.tied and key == TIED_HEAD)
    )


def check(found: Mapping[str, Shape], wanted: Iterable[Slot], config: LlavaConfig | None) -> None:
    """Compares the tensors of a checkpoint with the slots of a model.

    Args:
        found: canonical key -> shape.
        wanted: the slots.
        config: of the model, see `unused`.

    Raises:
        ValueError: everything missing, left over or of another shape, in one line.
    """
    wanted = {slot.key: slot.shape for slot in wanted}
    missing = [key for key in wanted if key not in found]
    leftover = [key for key in found if key not in wanted and not unused(key, config)]
    misshapen = [
        f"{files.line(key, 80)} is {files.shown(list(found[key]))}, expected {list(shape)}"
        for key, shape in wanted.items()
        if key in found and tuple(found[key]) != shape
    ]
    parts = [
        f"{len(keys)} {word}: {files.some(brief(keys) if fold else keys, 2, 110)}"
        for word, keys, fold in (
            ("missing", missing, True),
            ("left over", leftover, True),
            ("of another shape", misshapen, False),
        )
        if keys
    ]
    if parts:
        raise ValueError(f"tensors do not fit the config: {'; '.join(parts)}")


_LAYER = re.compile(r"(?:(?<=layers\.)|(?<=layer\.))\d+")


def brief(keys: Iterable[str]) -> list[str]:
    """Keys that differ in the layer number alone, in one: `layers.{0,1,2}.mlp.fc1.weight`."""
    layers: dict[str, list[str]] = {}
    for key in keys:
        number = _LAYER.search(key)
        layers.setdefault(_LAYER.sub("{}", key, count=1), []).append(number[0] if number else "")
    return [
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{_numbers(numbers)}}}")
        for pattern, numbers in layers.items()
    ]


def _numbers(numbers: list[str]) -> str:
    """All of few layer numbers, the ends of many."""
    return ",".join(numbers if len(numbers) <= 8 else [*numbers[:3], "...", numbers[-1]])
