"""Map Hugging Face tensors to parameters, and their axes, by key tables.

Parameters are named by dotted path (`lm.layers.attn.q.kernel`); those of layers are stacked along a
leading axis L. Hugging Face tensors are named in the canonical spelling of their family; the
`canonical_key` of the family maps other spellings to it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from mllm_jax import files

Shape = tuple[int, ...]

PEFT_PREFIX = "base_model.model."  # of the keys of a model that PEFT wraps


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axes between Hugging Face and this library.

    Attributes:
      name: The name of the transform.
      ours: Maps a Hugging Face tensor to a parameter.
      hf: Maps a parameter to a Hugging Face tensor.
    """

    name: str
    ours: Callable[[np.ndarray], np.ndarray]
    hf: Callable[[np.ndarray], np.ndarray]


def _patches_from_conv(weight: np.ndarray) -> np.ndarray:
    """Map [E, 3, row, column] to [row * column * 3, E]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def _conv_from_patches(kernel: np.ndarray) -> np.ndarray:
    pixels, width = kernel.shape
    side = math.isqrt(pixels // 3)
    return kernel.reshape(side, side, 3, width).transpose(3, 2, 0, 1)


COPY = Transform("copy", lambda x: x, lambda x: x)
LINEAR = Transform("linear", np.transpose, np.transpose)  # [out, in] <-> [in, out]
LEADING = Transform("leading", lambda x: x[0], lambda x: x[None])  # [1, ...] <-> [...]
CLS_TOKEN = Transform("cls token", lambda x: x[0, 0], lambda x: x[None, None])  # [1, 1, E] <-> [E]
PATCHES = Transform("patches", _patches_from_conv, _conv_from_patches)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
      key: The Hugging Face key, with `{layer}` for a layer number.
      path: The path of the parameter.
      transform: The change of axes.
      part: (number, count) if a tensor holds `count` parameters along its first axis.
      every: The factor from layer numbers of this library to those of Hugging Face.
    """

    key: str
    path: str
    transform: Transform
    part: tuple[int, int] = (0, 1)
    every: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """The position of one Hugging Face tensor in the parameters.

    Attributes:
      key: The Hugging Face key.
      path: The path of the parameter.
      layer: The index on its L axis; None if it has no such axis.
      shape: The shape of the Hugging Face tensor.
      transform: The change of axes.
      part: The part of the tensor, see `Row`.
    """

    key: str
    path: str
    layer: int | None
    shape: Shape
    transform: Transform
    part: tuple[int, int] = (0, 1)

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """Return the parameter, or its layer, from a Hugging Face tensor."""
        number, count = self.part
        return self.transform.ours(tensor if count == 1 else np.split(tensor, count)[number])


def rows(hf: str, ours: str, *table: tuple, every: int = 1) -> tuple[Row, ...]:
    """Return rows under a prefix; a line of the table is (key, path, transform[, part])."""
    return tuple(
        dataclasses.replace(Row(f"{hf}.{key}", f"{ours}.{path}", *rest), every=every)
        for key, path, *rest in table
    )


def linear(hf: str, ours: str, *part: tuple[int, int]) -> tuple[tuple, ...]:
    """Return the lines of a linear map."""
    weight = (f"{hf}.weight", f"{ours}.kernel", LINEAR, *part)
    return weight, (f"{hf}.bias", f"{ours}.bias", COPY, *part)


def norm(hf: str, ours: str) -> tuple[tuple, ...]:
    """Return the lines of a layer norm."""
    return (f"{hf}.weight", f"{ours}.scale", COPY), (f"{hf}.bias", f"{ours}.bias", COPY)


def slots(shapes: Mapping[str, Shape], table: Iterable[Row]) -> list[Slot]:
    """Return the position of every tensor of a model.

    Args:
      shapes: The shapes of all parameters by path, with the L axis.
      table: The key table. Rows of parameters that the model does not have (a tied head, biases)
        are skipped.

    Returns:
      The slots; those of one parameter follow each other.

    Raises:
      ValueError: A parameter has no row in the table.
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


_BUFFER = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)")


def respell(key: str, spellings: Iterable[tuple[str, str]]) -> str:
    """Replace the prefix of a key, by the first pair whose prefix the key begins with.

    Args:
      key: A Hugging Face key in any spelling.
      spellings: Pairs of a prefix and its replacement; a key without such a prefix is unchanged.
    """
    for prefix, spelling in spellings:
        if key.startswith(prefix):
            return spelling + key.removeprefix(prefix)
    return key


def is_buffer(key: str) -> bool:
    """Return whether a tensor is a buffer that older checkpoints hold beside the parameters."""
    return bool(_BUFFER.fullmatch(key))


def check(
    shapes: Mapping[str, Shape | None], wanted: Iterable[Slot], is_unused: Callable[[str], bool]
) -> None:
    """Compare the tensors of a checkpoint with the slots of a model.

    Args:
      shapes: The shape of each tensor by its canonical key; None where it is not known.
      wanted: The slots.
      is_unused: Whether a checkpoint may hold a tensor that the model does not use.

    Raises:
      ValueError: Tensors are missing, left over or of another shape; the message lists all.
    """
    expected = {slot.key: slot.shape for slot in wanted}
    missing = [key for key in expected if key not in shapes]
    leftover = [key for key in shapes if key not in expected and not is_unused(key)]
    misshapen = [
        f"{files.line(key, 80)} is {files.shown(list(given))}, expected {list(shape)}"
        for key, shape in expected.items()
        if (given := shapes.get(key)) is not None and tuple(given) != shape
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
    """Return keys with those of several layers merged: `layers.{0,1,2}.mlp.fc1.weight`."""
    layers: dict[str, list[str]] = {}
    for key in keys:
        number = _LAYER.search(key)
        layers.setdefault(_LAYER.sub("{}", key, count=1), []).append(number[0] if number else "")
    return [
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{_numbers(numbers)}}}")
        for pattern, numbers in layers.items()
    ]


def _numbers(numbers: list[str]) -> str:
    """Return a few layer numbers in full, and the first and last of many."""
    return ",".join(numbers if len(numbers) <= 8 else [*numbers[:3], "...", numbers[-1]])
