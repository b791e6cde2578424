"""Merge low-rank adapters (LoRA) in the layout of PEFT into the model they were trained on.

A directory contains `adapter_config.json` and the factors in `adapter_model.safetensors` or `.bin`.
The original LLaVA code saves parameters without factors, those of its projector, in
`non_lora_trainables.bin`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mllm_jax import files
from mllm_jax.checkpoints import keys, schema, tensors
from mllm_jax.checkpoints.stored import LazyTensor, Stored

CONFIG = "adapter_config.json"
TRAINED_WHOLE = "non_lora_trainables.bin"
BASE = "base_model_name_or_path"
_FACTORS = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
# Whole tensors of `modules_to_save`, and those below the factors of an embedding.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.\w+$)")
_MODULE = re.compile(r"\^?(\w+(\\?\.\w+)*)")  # an arbitrary pattern might never terminate

_RANK, _ALPHA = schema.whole(1, 2**14), schema.real(0, 1e6)
_FIELDS = {
    "peft_type": (schema.only("LORA"), "LORA"),
    BASE: (schema.optional(schema.NAME), None),
    "r": (_RANK, 8),
    "lora_alpha": (_ALPHA, 8),
    "use_rslora": (schema.FLAG, False),
    "use_dora": (schema.only(False), False),
    "bias": (schema.only("none"), "none"),
    # Other initialisations change the weights of the model before training.
    "init_lora_weights": (schema.only(True, False, "gaussian", "eva", "orthogonal"), True),
    "rank_pattern": (schema.PART, None),
    "alpha_pattern": (schema.PART, None),
}
# The keys of the factors name their layers. `fan_in_fan_out` concerns weights [in, out], which none
# of these models has; PEFT ignores it as well.
_IGNORED = frozenset(
    """
    auto_mapping corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform lora_dropout megatron_config megatron_core modules_to_save
    peft_version revision runtime_config target_modules task_type ensure_weight_tying
    qalora_group_size
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A matrix of a model plus a low-rank change, computed when it is read; a `LazyTensor`.

    Attributes:
      base: float[out, in], the matrix of the model.
      a: float[r, in], the first factor.
      b: float[out, r], the second factor.
      scale: The factor of b @ a.
    """

    base: LazyTensor
    a: Stored
    b: Stored
    scale: float

    dtype = np.dtype(np.float32)

    @property
    def path(self) -> pathlib.Path:
        """The file of the base matrix."""
        return self.base.path

    @property
    def key(self) -> str:
        """The key of the base matrix."""
        return self.base.key

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base matrix."""
        return self.base.shape

    def read(self) -> np.ndarray:
        """Return the sum, float32[out, in], not rounded to the dtype of the file."""
        a, b = (factor.read().astype(np.float32) for factor in (self.a, self.b))
        return self.base.read().astype(np.float32) + np.float32(self.scale) * (b @ a)


def is_adapter(directory: pathlib.Path) -> bool:
    """Return whether a directory contains an adapter, which needs the model that it changes."""
    return (directory / CONFIG).exists()


def read_fields(directory: pathlib.Path) -> dict[str, Any]:
    """Return the fields of an `adapter_config.json`.

    Raises:
      ValueError: The adapter is not a LoRA, or has unsupported fields, which the message lists.
    """
    path = directory / CONFIG
    problems: list[str] = []
    fields = files.read_json(path)
    # Options that are off have no effect; every version of PEFT adds some.
    given = {name: value for name, value in fields.items() if value or name in _FIELDS}
    found = schema.read(given, _FIELDS, _IGNORED, "", problems)
    for name, kind in (("rank_pattern", _RANK), ("alpha_pattern", _ALPHA)):
        pattern = found[name] or {}
        schema.values(pattern, dict.fromkeys(pattern, (kind, None)), f"{name}.", problems)
        problems += [
            f"{name}: {files.shown(module)} is not supported, only names of modules"
            for module in pattern
            if not _MODULE.fullmatch(module)
        ]
    if problems:
        raise ValueError(files.refusal(path, problems))
    return found


def merge(
    base: Mapping[str, LazyTensor | None],
    directory: pathlib.Path,
    problems: list[Exception],
    canonical_key: Callable[[str], str],
) -> Mapping[str, LazyTensor | None]:
    """Return the tensors of a model with those of an adapter, by canonical key and not yet read.

    Args:
      base: The tensors of the model by canonical key.
      directory: The directory of the adapter.
      problems: A list to which the problems of its files are appended.
      canonical_key: Maps any spelling of a key to the canonical one.

    Returns:
      The tensors by canonical key: changed by two factors, or replaced by a tensor of the
      adapter.
    """
    path = next((directory / name for name in _FACTORS if (directory / name).exists()), None)
    if path is None:
        names = " nor ".join(_FACTORS)
        problems.append(FileNotFoundError(files.refusal(directory, [f"has neither {names}"])))
        return base
    try:
        fields, found = read_fields(directory), tensors.open_file(path)
        whole = tensors.open_file(beside) if (beside := directory / TRAINED_WHOLE).exists() else []
    except (OSError, ValueError) as error:
        problems.append(error)
        return base
    factors: dict[str, dict[str, Stored]] = {}
    wrong, replaced = [], []
    for tensor in found:
        if (known := _factor(tensor)) is None:
            replaced.append(tensor)
            continue
        module, letter, factor = known
        if factors.setdefault(module, {}).setdefault(letter, factor) is not factor:
            wrong.append(f"{files.line(module, 80)} occurs twice")
    own = tensors.by_name(
        itertools.chain(replaced, whole),
        problems,
        lambda key: canonical_key(_WRAPPED.sub("", key)),
    )
    model: dict[str, LazyTensor | None] = {**base, **own}
    if not factors:
        wrong.append("no tensor is named lora_A or lora_B")
    for module, pair in factors.items():
        key = canonical_key(f"{module}.weight")
        module = module.removeprefix(keys.PEFT_PREFIX)
        rank = _module_setting("rank_pattern", "r", fields, module)
        matrix = model.get(key)
        if reason := _misfit(key in model, matrix, pair, rank):
            wrong.append(f"{files.line(module, 80)}: {reason}")
        elif matrix is not None:
            alpha = _module_setting("alpha_pattern", "lora_alpha", fields, module)
            scale = alpha / (math.sqrt(rank) if fields["use_rslora"] else rank)
            model[key] = Merged(matrix, pair["A"], pair["B"], scale)
    if wrong:
        problems.append(ValueError(files.refusal(path, wrong)))
    return model


def _factor(tensor: Stored) -> tuple[str, str, Stored] | None:
    """Return the module and the letter of a factor, with the factor; None for another tensor."""
    if match := _FACTOR.fullmatch(tensor.key):
        return match[1], match[2], tensor
    if match := _EMBEDDING_FACTOR.fullmatch(tensor.key):
        # PEFT adds (B A)^T to an embedding [V, D]: A^T takes the role of B.
        turned = tensor._replace(shape=tensor.shape[::-1], strides=tensor.strides[::-1])
        return match[1], {"A": "B", "B": "A"}[match[2]], turned
    return None


def _misfit(
    known: bool, base: LazyTensor | None, pair: Mapping[str, Stored], rank: int
) -> str | None:
    """Return why two factors do not fit a tensor; None if they fit."""
    if not known:
        return "the base model has no such tensor"
    if len(pair) < 2:
        (factor,) = pair.values()
        return f"has {factor.key[factor.key.rindex('lora_') :].removesuffix('.weight')} alone"
    if not all(jnp.issubdtype(factor.dtype, jnp.floating) for factor in pair.values()):
        return "is not floating-point"
    a, b = pair["A"].shape, pair["B"].shape
    if base is None or (base.shape == (*b[:1], *a[1:]) and a[:1] == b[1:] == (rank,)):
        return None
    shapes = f"{files.shown(list(b))} x {files.shown(list(a))}"
    return f"{shapes} of rank {rank} does not fit {list(base.shape)}"


def _module_setting(pattern: str, default: str, fields: Mapping[str, Any], module: str) -> Any:
    """Return a setting of one module: that of the first matching pattern, or the default."""
    for name, value in (fields[pattern] or {}).items():
        plain = name.removeprefix("^").replace("\\.", ".")
        if module == plain or (not name.startswith("^") and module.endswith(f".{plain}")):
            return value
    return fields[default]
