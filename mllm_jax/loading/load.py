"""Load a checkpoint: a directory, a name on the Hugging Face hub, or the embedded model."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import families, files
from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import keys, tensors
from mllm_jax.checkpoints.stored import LazyTensor, Stored
from mllm_jax.loading import adapters, embedded, parameters, settings, sources
from mllm_jax.loading.sources import locate, read_config, read_fields
from mllm_jax.models.multimodal import MultimodalConfig, MultimodalModel
from mllm_jax.models.projector import Projector
from mllm_jax.numerics import precision
from mllm_jax.processors import image_processors
from mllm_jax.processors.processor import Processor
from mllm_jax.sharding import mesh as mesh_
from mllm_jax.sharding import rules

_TRAIN_PROJECTOR = "python -m experiments.train --config=configs/embedded_projector.py"

Network = TypeVar("Network", bound=nnx.Module)


def load(
    name: str | os.PathLike,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    projector: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    seed: int = 0,
    image_aspect_ratio: str | None = None,
    max_pixels: int | None = None,
) -> tuple[MultimodalModel, Processor]:
    """Load a model and its processor.

    Args:
      name: "embedded", a directory, or a hub id. The checkpoint has the layout of transformers,
        the layout of the original LLaVA code, or is a LoRA adapter in the layout of PEFT, which
        is merged into its model.
      dtype: The dtype of the parameters: float32, whose products are float32 on every device (see
        `mllm_jax.numerics.precision`), bfloat16 or float16. None means float32 on CPU and
        bfloat16 elsewhere.
      mesh: A mesh from `mj.mesh`. Each process reads the parts of its own devices, see
        `sharding.rules`. None means the mesh of `jax.set_mesh`, or one device without a mesh.
      projector: None takes the checkpoint's own projector (for "embedded": the one that ships
        with this package), and "random" initialises a new one. Anything else is a file with a
        projector: safetensors, the `mm_projector.bin` of the original code, or a directory that
        contains the latter.
      base: The model that an adapter changes, a directory or a hub id. None means the model in the
        adapter's config.
      seed: The seed of a random projector.
      image_aspect_ratio: "pad" pads an image to a square, as in the training of LLaVA-1.5. None
        means the checkpoint's setting, see `Processor`.
      max_pixels: The largest number of pixels of a picture, for models that read it at its native
        resolution: larger ones are scaled down. None means the checkpoint's setting.

    Returns:
      The model and its processor.

    Raises:
      FileNotFoundError: There is no such checkpoint, or a part of it is missing.
      ValueError: The dtype is not supported, or the config or tensors are not those of a known
        model; the message lists all problems of the tensors.
    """
    dtype = precision.parameter_dtype(dtype)
    directory = locate(name)
    if name == "embedded" and projector is None:
        projector = embedded.projector_file()
        if not projector.exists():
            raise FileNotFoundError(
                f"{projector}: the trained projector is missing; train it with: {_TRAIN_PROJECTOR}"
                ' (or load with projector="random")'
            )
    model = read_model(directory, dtype=dtype, projector=projector, base=base, seed=seed, mesh=mesh)
    config_directory = sources.directory_with(sources.CONFIG, directory, base)
    token_directory = sources.directory_with(sources.TOKENS, directory, base)
    fields = read_fields(config_directory)
    options: dict[str, Any] = {"image_aspect_ratio": image_aspect_ratio}
    if original := families.original_layout(fields):
        config_file = config_directory / "config.json"
        pictures = sources.named_directory(config_file, fields, original.tower_field, weights=False)
        options["pictures"] = functools.partial(original.image_processor, pictures, model.config)
        options["image_aspect_ratio"] = image_aspect_ratio or fields.get("image_aspect_ratio")
    else:
        pictures = sources.directory_with(settings.PICTURES, directory, base)
        options["pictures"] = functools.partial(image_processors.read, pictures)
    settings.check(pictures, token_directory, model.config.tile_side)
    if max_pixels is not None:
        if model.config.tile_side is not None:
            raise ValueError(
                f"max_pixels={max_pixels}: {name} reads all pictures at "
                f"{model.config.tile_side} x {model.config.tile_side} pixels"
            )
        options["max_pixels"] = max_pixels
    processor = families.of(model.config).processor
    return model, processor.from_directory(token_directory, model.config, **options)


def read_model(
    directory: pathlib.Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    projector: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> MultimodalModel:
    """Read the model of a checkpoint directory, tensor by tensor; see `load`.

    Besides the model, the host holds at most one stacked parameter, or one device's part of it.

    Args:
      directory: The directory of the checkpoint.
      dtype: See `load`.
      projector: See `load`; the projector of the embedded model must be given.
      base: See `load`.
      seed: See `load`.
      mesh: See `load`.

    Returns:
      The model.
    """
    dtype = precision.parameter_dtype(dtype)
    problems: list[Exception] = []
    try:
        config_directory = sources.directory_with(sources.CONFIG, directory, base)
        config = read_config(config_directory)
    except fields_.Refused as error:
        if error.config is None:
            raise
        config = error.config
        problems.append(error)
    if projector is not None and config.projector is None:
        raise ValueError(files.refusal(directory, ["projector=: this model has no projector"]))
    family, unreadable = families.of(config), list[Exception]()
    stored = sources.open_tensors(directory, config_directory, base, family, unreadable)
    problems += unreadable
    config = _with_head_of_file(config, stored)
    graph, abstract, shapes = _abstract(lambda: config.build(rngs=nnx.Rngs(0)))
    slots = keys.slots(shapes, family.key_table(config))

    if projector is None and family.original and not any(map(family.is_projector, stored)):
        beside = directory / family.original.projector_file
        projector = beside if beside.exists() else None
    if projector is not None:
        stored = {key: tensor for key, tensor in stored.items() if not family.is_projector(key)}
        own = [slot for slot in slots if family.is_projector(slot.key)]
        slots = [slot for slot in slots if not family.is_projector(slot.key)]
    if stored or not unreadable:
        _check(stored, slots, _unused(config), directory, problems)
    if projector not in (None, "random"):
        overlay = _open_projector(projector, own, config, problems)
        stored, slots = {**stored, **overlay}, slots + own
    _raise(problems)
    complete = _complete(stored)
    places = _places(config, shapes, mesh)
    arrays = parameters.read(complete, slots, shapes, dtype, places)
    if projector == "random":
        arrays |= _random_projector(config, dtype, seed, places)
    state = {path: param.replace(arrays[dotted(path)]) for path, param in abstract.items()}
    return nnx.merge(graph, nnx.from_flat_state(state))


def read_network(
    build: Callable[[], Network],
    table: tuple[keys.Row, ...],
    directory: pathlib.Path,
    dtype: jax.typing.DTypeLike,
) -> Network:
    """Read a network that is not a multimodal model from a checkpoint of only this network.

    Args:
      build: A function that returns the network with random weights.
      table: The key table of the network.
      directory: The directory of the checkpoint.
      dtype: The dtype of the parameters.

    Returns:
      The network, on one device.

    Raises:
      FileNotFoundError: There are no weights, or a shard is missing.
      ValueError: The tensors do not fit the network; the message lists all problems.
    """
    graph, abstract, shapes = _abstract(build)
    slots = keys.slots(shapes, table)
    problems: list[Exception] = []
    stored = tensors.open_directory(directory, problems)
    if stored or not problems:
        _check(stored, slots, keys.is_buffer, directory, problems)
    _raise(problems)
    arrays = parameters.read(_complete(stored), slots, shapes, jnp.dtype(dtype), None)
    state = {path: param.replace(arrays[dotted(path)]) for path, param in abstract.items()}
    return nnx.merge(graph, nnx.from_flat_state(state))


def _abstract(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict, dict]:
    """Return the structure of a network, its abstract parameters by path, and shapes by name."""
    graph, state = nnx.split(nnx.eval_shape(build))
    abstract = dict(nnx.to_flat_state(state))
    return graph, abstract, {dotted(path): param.shape for path, param in abstract.items()}


def read_projector(model: MultimodalModel, path: str | os.PathLike) -> MultimodalModel:
    """Return the model with the projector of a file; all other parameters are shared.

    Args:
      model: The model, which is not changed.
      path: A file written by `write_projector`, or the `mm_projector.bin` of the original code.

    Returns:
      The new model; its projector has the dtype of the old one.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file holds no projector, or one that does not fit this model.
    """
    graph, state = nnx.split(model)
    params = dict(nnx.to_flat_state(state))
    own = {dotted(at): param for at, param in params.items() if at[0] == "projector"}
    shapes = {name: param.shape for name, param in own.items()}
    slots = keys.slots(shapes, families.of(model.config).key_table(model.config))
    problems: list[Exception] = []
    overlay = _open_projector(path, slots, model.config, problems)
    _raise(problems)
    on_mesh = mesh_.mesh_of(list(own.values())) is not None
    places = {name: param[...].sharding for name, param in own.items()} if on_mesh else None
    arrays = parameters.read(overlay, slots, shapes, next(iter(own.values())).dtype, places)
    new = {at: param.replace(arrays.get(dotted(at), param[...])) for at, param in params.items()}
    return nnx.merge(graph, nnx.from_flat_state(new))


def dotted(path: tuple) -> str:
    """Return a path in a module as one name: `lm.layers.attn.q.kernel`."""
    return ".".join(map(str, path))


def _open_projector(
    path: str | os.PathLike,
    slots: list[keys.Slot],
    config: MultimodalConfig,
    problems: list[Exception],
) -> dict[str, Stored]:
    """Return the tensors of a file with a projector, or of such a file in a directory."""
    family, path = families.of(config), pathlib.Path(path).expanduser()
    if path.is_dir():
        beside = adapters.is_adapter(path) and (path / adapters.TRAINED_WHOLE).exists()
        name = family.original.projector_file if family.original else ""
        path /= adapters.TRAINED_WHOLE if beside else name
    try:
        found = tensors.by_name(tensors.open_file(path), problems, family.canonical_key)
    except (OSError, ValueError) as error:
        problems.append(error)
        return {}
    _check(found, slots, _unused(config), path, problems)
    return found


def _check(
    stored: Mapping[str, LazyTensor | None],
    slots: list[keys.Slot],
    is_unused: Callable[[str], bool],
    source: str | os.PathLike,
    problems: list[Exception],
) -> None:
    """Compare tensors with the slots of a model; a tensor that could not be opened fits."""
    wanted = {slot.key for slot in slots}
    shapes = {key: None if t is None else t.shape for key, t in stored.items()}
    try:
        keys.check(shapes, slots, is_unused)
    except ValueError as error:
        problems.append(ValueError(files.refusal(source, [error])))
    problems += [
        ValueError(
            files.refusal(
                tensor.path,
                [f"{files.line(tensor.key, 80)} holds {tensor.dtype}, expected floating point"],
            )
        )
        for key, tensor in stored.items()
        if key in wanted and tensor is not None and not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]


def _unused(config: MultimodalConfig) -> Callable[[str], bool]:
    """Return a predicate of tensors that a checkpoint may hold and the model does not use."""
    return lambda key: families.of(config).is_unused(key, config)


def _complete(stored: Mapping[str, LazyTensor | None]) -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint that has no problems, so none of them is None."""
    return {key: tensor for key, tensor in stored.items() if tensor is not None}


def _raise(problems: list[Exception]) -> None:
    """Raise one error that lists as many problems as fit in a line; its cause has all of them."""
    if problems:
        missing = any(isinstance(problem, FileNotFoundError) for problem in problems)
        kind = FileNotFoundError if missing else ValueError
        raise kind(files.joined(problems)) from ExceptionGroup("all problems", problems)


def _with_head_of_file(
    config: MultimodalConfig, stored: Mapping[str, LazyTensor | None]
) -> MultimodalConfig:
    """Return the config, untied if the file has a head that differs from the embedding.

    transformers does the same; files of Mistral 3 omit `tie_word_embeddings`, which defaults to
    true.
    """
    named = {row.path: row.key for row in families.of(config).key_table(config)}
    head, embed = (stored.get(named[path]) for path in ("lm.head.kernel", "lm.embed"))
    if not config.lm.tied or head is None or embed is None:
        return config
    if np.array_equal(head.read(), embed.read()):
        return config
    return dataclasses.replace(config, lm=dataclasses.replace(config.lm, tied=False))


def _places(
    config: MultimodalConfig,
    shapes: Mapping[str, keys.Shape],
    mesh: jax.sharding.Mesh | None,
) -> Mapping[str, jax.sharding.Sharding] | None:
    """Return the sharding of each parameter by path; None if no mesh is given or active."""
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        return None
    return rules.shardings(config, families.of(config).sharding_rules(config), shapes, mesh)


def _random_projector(
    config: MultimodalConfig,
    dtype: np.dtype,
    seed: int,
    places: Mapping[str, jax.sharding.Sharding] | None,
) -> dict[str, jax.Array]:
    """Return the parameters of a new projector by path."""
    state = jax.jit(lambda: nnx.state(Projector(config.projector, rngs=nnx.Rngs(seed))))()
    named = {dotted(("projector", *path)): param for path, param in nnx.to_flat_state(state)}
    arrays = {name: np.asarray(param[...].astype(dtype)) for name, param in named.items()}
    return {
        name: parameters.put(
            array.__getitem__, array.shape, None if places is None else places[name]
        )
        for name, array in arrays.items()
    }
