"""Files of domain neurons: the `.pth` of MMNeuron and LAPE, and a native one that knows its names.

    masks.read_pth("LLaMA-2-7B.neuron.pth", width=11008)      # bool[D_, L, F]
    masks.save("neurons.npz", {"lm.mlp.act": mask}, domains)  # and masks.load

A `.pth` is a list over domains of a list over layers of int64 neuron indices. It names neither the
domains, nor the module, nor how many neurons a layer has. D_ domains, L layers, F neurons.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax import store
from mllm_jax.checkpoints import torch_file


class Masks(NamedTuple):
    """What a native file holds.

    Attributes:
        modules: {site: bool[D_, L, F]}, the neurons of each domain.
        domains: their names, [D_].
    """

    modules: dict[str, np.ndarray]
    domains: tuple[str, ...]


def read_pth(path: str | pathlib.Path, width: int, *, domains: int | None = None) -> np.ndarray:
    """Reads a file of MMNeuron's `identify.py` or of LAPE; nothing in it is executed.

    Args:
        path: the file.
        width: F, neurons of a layer, which the file does not say.
        domains: D_. The official code drops domains without neurons from the end of the list; they
            come back as empty. By default as many as there are.

    Returns:
        bool[D_, L, F].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list, a neuron lies beyond `width`, or domains are too many.
    """
    lists = torch_file.read(path)
    if not _is_list_of_lists(lists) or len({len(layers) for layers in lists}) != 1:
        raise ValueError(f"{path}: no list over domains of lists over as many layers each")
    domains = len(lists) if domains is None else domains
    if len(lists) > domains:
        raise ValueError(f"{path}: has {len(lists)} domains, more than the {domains} expected")
    mask = np.zeros((domains, len(lists[0]), width), bool)
    for domain, layers in enumerate(lists):
        for layer, neurons in enumerate(layers):
            where = f"{path}: domain {domain}, layer {layer}"
            if (
                not np.issubdtype(getattr(neurons, "dtype", object), np.integer)
                or neurons.ndim != 1
            ):
                raise ValueError(f"{where}: not a list of neuron indices")
            for beyond in neurons[(neurons < 0) | (neurons >= width)][:1]:
                raise ValueError(f"{where}: neuron {beyond} of a layer of width {width}")
            mask[domain, layer, neurons] = True
    return mask


def write_pth(path: str | pathlib.Path, mask: np.ndarray) -> None:
    """Writes a mask as the official code does; `torch.load(path, weights_only=True)` reads it.

    Domains without neurons are written, wherever they stand, so that the official code's own
    reader finds each domain in its place.

    Args:
        path: the file; it appears whole or not at all.
        mask: bool[D_, L, F].
    """
    mask = _checked(mask, "mask")
    torch_file.write(
        [[np.flatnonzero(layer).astype(np.int64) for layer in layers] for layers in mask], path
    )


def save(
    path: str | pathlib.Path, modules: Mapping[str, np.ndarray], domains: Sequence[str]
) -> None:
    """Writes the native file, an .npz of plain arrays.

    Args:
        path: the file; it appears whole or not at all.
        modules: {site: bool[D_, L, F]}.
        domains: their names.
    """
    if "domains" in modules:
        raise ValueError("a site cannot be named 'domains'")
    arrays = {name: _checked(mask, name) for name, mask in modules.items()}
    for name, mask in arrays.items():
        if len(mask) != len(domains):
            raise ValueError(f"{name} has {len(mask)} domains, but {len(domains)} are named")
    store.atomic_npz(path, {**arrays, "domains": np.array(list(domains), np.str_)})


def load(path: str | pathlib.Path) -> Masks:
    """Reads the native file; no pickle is loaded."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        domains = arrays.pop("domains")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip fails in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a file of domain neurons ({reason})") from error
    modules = {name: _checked(mask, f"{path}: {name}") for name, mask in arrays.items()}
    return Masks(modules, tuple(map(str, domains)))


def _is_list_of_lists(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, list) for v in value)


def _checked(mask: np.ndarray, name: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 3:
        raise ValueError(
            f"{name} must be bool[domains, layers, neurons], not {mask.dtype} of shape {mask.shape}"
        )
    return mask
