"""Read and write domain neurons: `.pth` files of MMNeuron and LAPE, and a native file with names.

    masks.read_pth("LLaMA-2-7B.neuron.pth", width=11008)      # bool[D_, L, F]
    masks.save("neurons.npz", {"lm.mlp.act": mask}, domains)  # and masks.load

A `.pth` file is a list over domains of lists over layers of int64 neuron indices. It contains
neither the names of the domains, nor that of the module, nor the number of neurons of a layer.
D_ domains, L layers, F neurons.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax import files, store
from mllm_jax.checkpoints import archive, torch_file

_MAX_ELEMENTS = 2**29  # of a mask; a domain of Llama 405B has 7 million neurons
_MAX_LISTS = 2**17


class Masks(NamedTuple):
    """The content of a native file.

    Attributes:
      modules: {site: bool[D_, L, F]}, the neurons of each domain.
      domains: The names of the domains, [D_].
    """

    modules: dict[str, np.ndarray]
    domains: tuple[str, ...]


def read_pth(path: str | pathlib.Path, width: int, *, domains: int | None = None) -> np.ndarray:
    """Read a file of MMNeuron's `identify.py` or of LAPE, without executing its pickle.

    Args:
      path: The file.
      width: F, the number of neurons of a layer, which the file does not contain.
      domains: D_. The official code drops domains without neurons from the end of the list; they
        are read as empty. By default the number of domains in the file.

    Returns:
      bool[D_, L, F].

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is not such a list, a neuron is not below `width`, or the file has more
        domains than `domains`.
    """
    path = files.regular(path)
    name, lists = files.line(path, 250), torch_file.read(path)
    if not _is_list_of_lists(lists) or len({len(layers) for layers in lists}) != 1:
        raise ValueError(f"{name}: not a list over domains of lists over equally many layers")
    domains = len(lists) if domains is None else domains
    if len(lists) > domains:
        raise ValueError(f"{name}: has {len(lists)} domains, more than the {domains} expected")
    count = domains * len(lists[0])
    if count > _MAX_LISTS or count * width > _MAX_ELEMENTS:
        raise ValueError(
            f"{name}: a mask of {domains} domains, {len(lists[0])} layers and {width} neurons is "
            "too large"
        )
    mask = np.zeros((domains, len(lists[0]), width), bool)
    for domain, layers in enumerate(lists):
        for layer, neurons in enumerate(layers):
            where = f"{name}: domain {domain}, layer {layer}"
            if (
                not np.issubdtype(getattr(neurons, "dtype", object), np.integer)
                or neurons.ndim != 1
            ):
                raise ValueError(f"{where}: not a list of neuron indices")
            if neurons.size > width:
                raise ValueError(f"{where}: {neurons.size} neurons of a layer of width {width}")
            for beyond in neurons[(neurons < 0) | (neurons >= width)][:1]:
                raise ValueError(f"{where}: neuron {beyond} of a layer of width {width}")
            mask[domain, layer, neurons] = True
    return mask


def write_pth(path: str | pathlib.Path, mask: np.ndarray) -> None:
    """Write a mask as the official code does, for `torch.load(path, weights_only=True)`.

    Domains without neurons are written as well, so that the official reader assigns each list to
    its domain.

    Args:
      path: The file, which is written atomically.
      mask: bool[D_, L, F].
    """
    mask = _checked(mask, "mask")
    torch_file.write(
        [[np.flatnonzero(layer).astype(np.int64) for layer in layers] for layers in mask], path
    )


def save(
    path: str | pathlib.Path, modules: Mapping[str, np.ndarray], domains: Sequence[str]
) -> None:
    """Write the native file, an .npz of plain arrays.

    Args:
      path: The file, which is written atomically.
      modules: {site: bool[D_, L, F]}, the neurons of each domain.
      domains: The names of the domains.

    Raises:
      ValueError: A mask has another form, or another number of domains.
    """
    if "domains" in modules:
        raise ValueError("a site cannot be named 'domains'")
    arrays = {name: _checked(mask, name) for name, mask in modules.items()}
    for name, mask in arrays.items():
        if len(mask) != len(domains):
            raise ValueError(f"{name} has {len(mask)} domains, but {len(domains)} are named")
    store.atomic_npz(path, {**arrays, "domains": np.array(list(domains), np.str_)})


def load(path: str | pathlib.Path) -> Masks:
    """Read the native file; no pickle is loaded.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: It is not a file of `save`, or it is damaged.
    """
    path = files.regular(path)
    try:
        members = archive.members(path)
        if sum(member.size for member in members.values()) > _MAX_ELEMENTS:
            raise ValueError("too large for a mask")
        arrays = {
            name.removesuffix(".npy"): _array(archive.read(path, member))
            for name, member in members.items()
        }
        domains = _names(arrays.pop("domains"))
    except archive.Compressed as error:
        reason = "compressed; write it with masks.save or np.savez"
        raise ValueError(files.refusal(path, [reason])) from error
    except Exception as error:  # the header of an array is Python code, which can raise anything
        reason = files.line(f"no {error}" if isinstance(error, KeyError) else error, 120)
        raise ValueError(
            files.refusal(path, [f"not a file of domain neurons ({reason})"])
        ) from error
    modules = {}
    for name, mask in arrays.items():
        named = f"{files.line(path, 200)}: {files.line(name, 60)}"
        modules[name] = _checked(mask, named)
        if len(mask) != len(domains):
            raise ValueError(f"{named} has {len(mask)} domains, but {len(domains)} are named")
    return Masks(modules, domains)


def _array(content: bytes) -> np.ndarray:
    """Return the array of an .npy file whose header must describe exactly the bytes after it."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"version {version} of .npy")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("it holds a pickle")
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"{len(content)} bytes for an array of shape {shape}")
    return np.ndarray(shape, dtype, content, stream.tell(), order="F" if fortran else "C")


def _names(array: np.ndarray) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError("domains are not a list of names")
    return tuple(map(str, array))


def _is_list_of_lists(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, list) for v in value)


def _checked(mask: np.ndarray, name: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 3:
        raise ValueError(
            f"{name} must be bool[domains, layers, neurons], not {mask.dtype} of shape {mask.shape}"
        )
    return mask
