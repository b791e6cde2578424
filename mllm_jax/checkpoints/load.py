"""Loads a checkpoint: a directory, a name on the Hugging Face hub, or the embedded model."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.checkpoints import config as configs
from mllm_jax.checkpoints import embedded, tables, tensors
from mllm_jax.models import llava
from mllm_jax.models.projector import Projector

if TYPE_CHECKING:
    from mllm_jax.data.processor import Processor

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
_TRAIN_PROJECTOR = "python -m experiments.train --config=configs/embedded_projector.py"


def load(
    name: str | os.PathLike,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    projector: str | os.PathLike | None = None,
    seed: int = 0,
    image_aspect_ratio: str | None = None,
) -> tuple[llava.Llava, Processor]:
    """Loads a model and its processor.

    Args:
        name: "embedded", a directory in the form of a Hugging Face LLaVA checkpoint, or a hub id.
        dtype: of the parameters; None is float32 on CPU and bfloat16 elsewhere.
        mesh: not supported yet, must be None.
        projector: None takes the checkpoint's own (of "embedded": the one that ships with this
            package), "random" a new one, anything else is a safetensors file with one.
        seed: of a random projector.
        image_aspect_ratio: "pad" shows LLaVA-1.5 a picture as it was trained, with bars to make it
            square; None as the checkpoint says, see `Processor`.

    Returns:
        The model and its processor.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a part of it is missing.
        ValueError: the config or the tensors are not those of a model we have.
    """
    from mllm_jax.data.processor import Processor  # `data` reads checkpoints too

    if mesh is not None:
        raise ValueError("load(mesh=...) is not supported yet; leave it out to use one device")
    directory = locate(name)
    if name == "embedded" and projector is None:
        projector = embedded.projector_file()
        if not projector.exists():
            raise FileNotFoundError(
                f"{projector}: the trained projector is missing; train it with: {_TRAIN_PROJECTOR}"
                ' (or load with projector="random")'
            )
    model = read_model(directory, dtype=dtype, projector=projector, seed=seed)
    return model, Processor.from_directory(
        directory, model.config, image_aspect_ratio=image_aspect_ratio
    )


def locate(name: str | os.PathLike) -> pathlib.Path:
    """The directory of a checkpoint, made or fetched if need be; see `load`."""
    if name == "embedded":
        return embedded.directory()
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(os.fspath(name), allow_patterns=_HUB_FILES)
        )
    except (OSError, ValueError) as error:  # offline, no such name, not a name at all
        first, *_ = str(error).splitlines()
        raise FileNotFoundError(
            f"{os.fspath(name)!r} is neither a directory nor to be had from the hub: {first}"
        ) from error


def read_config(directory: pathlib.Path) -> llava.LlavaConfig:
    """Reads `config.json` of a checkpoint directory."""
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing, so this is not a checkpoint") from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    return configs.from_hf(fields, path)


def read_model(
    directory: pathlib.Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    projector: str | os.PathLike | None = None,
    seed: int = 0,
) -> llava.Llava:
    """Reads the model of a checkpoint directory, tensor by tensor; see `load`.

    On the host there is never more than one stacked parameter beside the model.

    Args:
        directory: of the checkpoint. dtype, projector, seed: as `load` has them, save that the
            projector of the embedded model is not found by itself.

    Returns:
        The model.
    """
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    config = read_config(directory)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    abstract = dict(nnx.to_flat_state(abstract))
    slots = tables.slots(
        {dotted(path): param.shape for path, param in abstract.items()}, config.projector.depth
    )
    with contextlib.ExitStack() as files:
        stored = tensors.open_directory(directory, files)
        if projector is None:
            _check(stored, slots, config, directory)
            arrays = _fill(stored, slots, abstract, dtype)
        else:
            own = [slot for slot in slots if slot.path.startswith("projector.")]
            rest = [slot for slot in slots if slot not in own]
            _check(_without_projector(stored), rest, config, directory)
            arrays = _fill(stored, rest, abstract, dtype)
            if projector == "random":
                arrays |= _random_projector(config, dtype, seed)
            else:
                overlay = tensors.open_files([pathlib.Path(projector)], files)
                _check(overlay, own, config, projector)
                arrays |= _fill(overlay, own, abstract, dtype)
        _check_tied(stored, config, directory)
    state = {path: param.replace(arrays[dotted(path)]) for path, param in abstract.items()}
    return nnx.merge(graph, nnx.from_flat_state(state))


def dotted(path: tuple) -> str:
    """A path in a module as one name: `lm.layers.attn.q.kernel`."""
    return ".".join(map(str, path))


def _without_projector(stored: Mapping[str, tensors.Stored]) -> dict[str, tensors.Stored]:
    return {k: v for k, v in stored.items() if not k.startswith("multi_modal_projector.")}


def _check(
    stored: Mapping[str, tensors.Stored],
    slots: list[tables.Slot],
    config: llava.LlavaConfig,
    source: str | os.PathLike,
) -> None:
    try:
        tables.check({key: tensor.shape for key, tensor in stored.items()}, slots, config)
    except ValueError as error:
        raise ValueError(f"{os.fspath(source)}: {error}") from error


def _check_tied(
    stored: Mapping[str, tensors.Stored], config: llava.LlavaConfig, directory: pathlib.Path
) -> None:
    """A tied model may come with its head, if that is the embedding once more."""
    if config.lm.tied and tables.TIED_HEAD in stored:
        head, embed = (stored[key].read() for key in (tables.TIED_HEAD, tables.EMBEDDING))
        if not np.array_equal(head, embed):
            raise ValueError(
                f"{directory}: tie_word_embeddings is true, but the file has a head that is not "
                "the embedding; set it to false in config.json to use that head"
            )


def _fill(
    stored: Mapping[str, tensors.Stored],
    slots: list[tables.Slot],
    abstract: Mapping[tuple, nnx.Variable],
    dtype: np.dtype,
) -> dict[str, jax.Array]:
    """Our path -> array, each read into its place on the L axis."""
    shapes = {dotted(path): param.shape for path, param in abstract.items()}
    arrays = {}
    for path, group in itertools.groupby(slots, lambda slot: slot.path):
        array = _empty(shapes[path], dtype)
        for slot in group:
            place = ... if slot.layer is None else slot.layer
            array[place] = slot.transform.ours(stored[slot.key].read())
        arrays[path] = jax.device_put(array, may_alias=True)
    return arrays


def _empty(shape: tables.Shape, dtype: np.dtype) -> np.ndarray:
    """An array that JAX on CPU takes over without a copy: it begins at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _random_projector(
    config: llava.LlavaConfig, dtype: np.dtype, seed: int
) -> dict[str, jax.Array]:
    state = jax.jit(lambda: nnx.state(Projector(config.projector, rngs=nnx.Rngs(seed))))()
    return {
        dotted(("projector", *path)): param[...].astype(dtype)
        for path, param in nnx.to_flat_state(state)
    }
