"""Tiny checkpoints of every format, damage to their files, and what a reader may say of it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from mllm_jax.checkpoints import masks, read_gguf, read_onnx, torch_file
from mllm_jax.loading import load, save
from tests.helpers import gguf_file, onnx_file, spellings

SECONDS = 5


class Format(NamedTuple):
    """A checkpoint of one format.

    Attributes:
      files: Those that are damaged, relative to the directory.
      read: A directory to its arrays by name.
      structure: Of a file, how many bytes of its beginning say what the rest is; damage beyond
        those is another value, which no reader can tell. None for all.
      differing: Arrays that may have other values where values cannot be told from structure.
    """

    files: tuple[str, ...]
    read: Callable[[pathlib.Path], dict[str, np.ndarray]]
    structure: Callable[[bytes], int] | None = None
    differing: int = 0


def leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    return {load.dotted(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))}


def read_model(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return leaves(load.read_model(directory, dtype=jnp.float32))


def header(content: bytes) -> int:
    """Bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(content[:8], "little")


def write_all(model: nnx.Module, root: pathlib.Path) -> dict[str, Format]:
    """Writes one checkpoint of every format into a folder of its name."""
    hf = save.save_hf(model, None, root / "safetensors")
    tensors = safetensors.numpy.load_file(hf / "model.safetensors")
    fields = json.loads((hf / "config.json").read_text())
    formats = {
        "safetensors": Format(("model.safetensors",), read_model, header),
        "config": Format(("config.json",), read_model),
    }

    _config(fields, root / "bin")
    torch_file.write(tensors, root / "bin" / "pytorch_model.bin")
    formats["bin"] = Format(("pytorch_model.bin",), read_model)

    _config(fields, root / "shards")
    names = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    for n, name in enumerate(names):
        part = {key: tensors[key] for key in sorted(tensors)[n::2]}
        safetensors.numpy.save_file(part, root / "shards" / name)
    places = {key: names[n % 2] for n, key in enumerate(sorted(tensors))}
    index = root / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    formats["shards"] = Format((*names,), read_model, header)
    formats["index"] = Format((index.name,), read_model)

    whole = dict(tensors)  # the original layout has no fold
    spellings.write_original(whole, fields, root / "original", torch_file.write)
    config = root / "original" / "model" / "config.json"
    plain = json.loads(config.read_text()) | {"mm_vision_tower": "../clip"}
    config.write_text(json.dumps(plain))
    formats["original"] = Format(
        tuple(f"model/pytorch_model-0000{n}-of-00002.bin" for n in (1, 2))
        + ("clip/pytorch_model.bin",),
        lambda directory: read_model(directory / "model"),
    )

    (root / "gguf").mkdir()
    weights = gguf_file.gguf_tensors(gguf_file.weights())
    gguf_file.write(root / "gguf" / "m.gguf", weights)
    data = sum(-(-weight.nbytes // 32) * 32 for weight in weights.values())
    formats["gguf"] = Format(
        ("m.gguf",),
        lambda d: read_gguf.read(d / "m.gguf").tensors,
        lambda content: len(content) - data,
    )
    (root / "onnx").mkdir()
    nodes, stored, _ = onnx_file.parts()
    onnx_file.write(root / "onnx" / "m.onnx", nodes, stored)
    formats["onnx"] = Format(("m.onnx",), lambda d: read_onnx.read(d / "m.onnx"), None, 1)

    mask = np.random.default_rng(0).random((2, 3, 40)) < 0.3
    masks.save(root / "npz" / "m.npz", {"lm.mlp.act": mask}, ("ad", "med"))
    formats["npz"] = Format(("m.npz",), lambda d: masks.load(d / "m.npz").modules)
    masks.write_pth(root / "pth" / "m.pth", mask)
    formats["pth"] = Format(("m.pth",), lambda d: {"": masks.read_pth(d / "m.pth", 40)})
    return formats


def _config(fields: dict, directory: pathlib.Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))


def damaged(content: bytes, reach: int, rng: np.random.Generator) -> bytes:
    """The bytes of a file after an accident within its first `reach` bytes, or at its end."""
    new, at = bytearray(content), int(rng.integers(reach))
    length = int(rng.integers(1, 40))
    kind = rng.integers(8)
    if kind <= 2:
        new[at] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        new[at] = int(rng.integers(256))
    elif kind == 4:
        new[at : min(at + length, reach)] = bytes(min(at + length, reach) - at)
    elif kind == 5:
        new = new[: int(rng.integers(len(new)))]
    elif kind == 6:
        new = new[:at] + new[at + length :]
    else:
        new = new[:at] + rng.bytes(length) + new[at:]
    return bytes(new)


@contextlib.contextmanager
def refusing(*names: str) -> Iterator[None]:
    """What is read may be refused: in one short line that names one of the files, and soon."""
    start = time.process_time()
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        assert len(message) < 400 and message.isprintable(), message
        assert any(name in message for name in names), message
    assert time.process_time() - start < SECONDS


def refused(read, *names: str) -> str:
    """The message of the error that reading must end in."""
    before, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    with refusing(*names):
        try:
            read()
        except (ValueError, OSError) as error:
            message = str(error)
            raise
    assert message, "was read"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    return message


def attempt(format: Format, source: pathlib.Path, place: pathlib.Path, seed: int) -> bool | None:
    """Damages a copy and reads it: whether it is right, or None if it is refused."""
    rng = np.random.default_rng(seed)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    path = place / format.files[rng.integers(len(format.files))]
    content = path.read_bytes()
    reach = format.structure(content) if format.structure else len(content)
    path.write_bytes(damaged(content, reach, rng))
    found = None
    with refusing(str(place)):
        found = format.read(place)
    if found is None:
        return None
    expected = format.read(source)
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in expected.items()}:
        return False
    other = [key for key in expected if not np.array_equal(found[key], expected[key])]
    return len(other) <= format.differing
