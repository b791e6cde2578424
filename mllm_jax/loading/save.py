"""Write a model as a Hugging Face checkpoint, through the key tables that read it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from mllm_jax import families, files
from mllm_jax.checkpoints import keys, tensors, torch_file
from mllm_jax.loading import load
from mllm_jax.models.multimodal import MultimodalModel
from mllm_jax.sharding import hosts, mesh

if TYPE_CHECKING:
    from mllm_jax.processors.processor import Processor

_PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "qformer_tokenizer",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
# Fields of the source that no longer apply, or that are written in another form.
_OUTDATED_FIELDS = (
    "dtype",
    "image_token_id",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "torch_dtype",
)
_TOKENIZER_FIELDS = ("bos_token_id", "eos_token_id", "max_position_embeddings", "pad_token_id")


def save_hf(
    model: MultimodalModel, processor: Processor | None, directory: str | os.PathLike
) -> pathlib.Path:
    """Write a model as a checkpoint that transformers loads.

    A CLIP tower ends at the layer whose output is used (`vision_feature_layer` becomes -1), because
    later layers are not loaded. Its final norm, which LLaVA does not use, is written as the
    identity. A model that folds patches, or whose projector does not have two linear maps, is
    written with the fields `projector_fold` and `projector_depth` of this library, which
    transformers cannot load.

    Args:
      model: The model.
      processor: The source of the tokenizer and of the image settings; None writes neither.
      directory: A new or empty directory.

    Returns:
      The directory.

    Raises:
      FileExistsError: The directory holds files.
    """
    directory = pathlib.Path(directory)
    taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if hosts.broadcast_from_primary(taken):
        raise FileExistsError(f"{directory}: exists and is not empty; delete it or choose another")
    arrays = _tensors(model) | families.of(model.config).unused_tensors(model)
    if hosts.is_primary():
        _write(model, arrays, processor, directory)
    hosts.barrier(str(directory))
    return directory


def _write(model, arrays, processor: Processor | None, directory: pathlib.Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    source = None
    if processor is not None and processor.directory is not None:
        source = pathlib.Path(processor.directory)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tensors.write(arrays, partial / "model.safetensors")
        fields = families.of(model.config).to_hf(model.config)
        fields = _merge(_source_config(source), fields)
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if source is not None:
            for path in (source / name for name in _PROCESSOR_FILES):
                if path.is_dir():
                    shutil.copytree(path, partial / path.name)
                elif path.exists():
                    shutil.copyfile(path, partial / path.name)
        partial.chmod(0o755)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def projector_tensors(model: MultimodalModel) -> dict[str, np.ndarray]:
    """Return the tensors of the projector by Hugging Face key, such as `...linear_1.weight`."""
    return {key: np.asarray(value) for key, value in _tensors(model, "projector").items()}


def write_projector(
    model: MultimodalModel, path: str | os.PathLike, dtype: jax.typing.DTypeLike = np.float16
) -> None:
    """Write only the projector, for `load(..., projector=path)` and `read_projector`.

    Args:
      model: The model.
      path: A `.safetensors` file with Hugging Face keys, or a `.bin` file in the format of
        `mm_projector.bin` of the original LLaVA code; an existing file is replaced.
      dtype: The dtype in the file.

    Raises:
      ValueError: The file has another suffix, or a weight overflows in dtype.
    """
    path = pathlib.Path(path)
    with np.errstate(over="ignore"):  # checked below
        arrays = {key: value.astype(dtype) for key, value in projector_tensors(model).items()}
    if bad := [key for key, value in arrays.items() if not np.isfinite(value).all()]:
        raise ValueError(f"{path}: not finite in {np.dtype(dtype).name}: {', '.join(bad)}")
    if path.suffix == ".safetensors":
        tensors.write(arrays, path)
    elif path.suffix == ".bin":
        original = families.of(model.config).original
        if original is None:
            problem = f"its original layout has no name for {files.some(arrays)}"
            raise ValueError(files.refusal(path, [f"{problem}; write .safetensors instead"]))
        names = original.projector_keys(arrays)
        torch_file.write({names[key]: value for key, value in arrays.items()}, path)
    else:
        raise ValueError(f"{path}: a projector is written as .safetensors or .bin")


@dataclasses.dataclass(frozen=True)
class _HfTensor:
    """A tensor in the layout of Hugging Face, computed from parameters when it is written.

    Attributes:
      arrays: The parts of the tensor among the parameters.
      slot: The slot of one of the parts.
    """

    arrays: list[np.ndarray]
    slot: keys.Slot

    @property
    def shape(self) -> keys.Shape:
        return self.slot.shape

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        parts = [self.slot.transform.hf(array) for array in self.arrays]
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0], dtype)


def _tensors(model: MultimodalModel, part: str | None = None) -> dict[str, _HfTensor]:
    """Return the tensors of the model, or of one module, by Hugging Face key."""
    params = {
        load.dotted(path): param
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if part in (None, path[0])
    }
    arrays = {path: mesh.to_numpy(param[...]) for path, param in params.items()}
    shapes = {path: array.shape for path, array in arrays.items()}
    table = families.of(model.config).key_table(model.config)
    found: dict[str, _HfTensor] = {}
    for slot in keys.slots(shapes, table):
        array = arrays[slot.path][... if slot.layer is None else slot.layer]
        found.setdefault(slot.key, _HfTensor([], slot)).arrays.append(array)
    return found


def _source_config(source: pathlib.Path | None) -> dict[str, Any]:
    """Return other fields of the source config: special token ids, context length and so on."""
    if source is None or not (source / "config.json").exists():
        return {}
    fields = files.read_json(source / "config.json")
    if families.original_layout(fields):
        return {"text_config": {k: fields[k] for k in _TOKENIZER_FIELDS if k in fields}}
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in _OUTDATED_FIELDS:
            part.pop(name, None)
    return fields


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = _merge(old, value)
        merged[name] = value
    return merged
