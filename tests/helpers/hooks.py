"""Edits of networks of transformers by hooks, the way that others intervene: an oracle for ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.hooks import RemovableHandle

from mllm_jax import sites
from mllm_jax.families.llava import keys as llava_keys
from tests.helpers import hf
from tests.helpers.family import Family

torch = hf.torch
Change = Callable[[torch.Tensor], torch.Tensor]


def module_of(family: Family, text: str, layer: int) -> tuple[torch.nn.Module, str]:
    """The module that the `hf` column of a site names, and whether its input or its output is it."""
    for path, read in re.findall(r"(\S+) \((\w+)\)", text):
        path = path.replace("{i}", str(layer))
        for name, module in family.network.named_modules():
            if path in (name, llava_keys.canonical_key(f"{name}.").removesuffix(".")):
                return module, read
    raise ValueError(f"no module of {text}")


def change(family: Family, name: str, layer: int, fn: Change) -> RemovableHandle:
    """Let a tensor at a site of ours be fn(tensor) in their network."""
    text = family.where.get(name, sites.get(name).hf)
    module, read = module_of(family, text, layer)
    if read == "input":
        return module.register_forward_pre_hook(lambda module, args: (fn(args[0]), *args[1:]))

    def hook(module, args, out):
        return (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)

    return module.register_forward_hook(hook)


def hide(family: Family, layer: int, heads: Sequence[int], hidden: np.ndarray) -> RemovableHandle:
    """Let the queries of some heads of a layer not see keys, hidden bool[B, T, S]."""
    text = family.where.get("lm.attn.pattern", sites.get("lm.attn.pattern").hf)
    module, _ = module_of(family, text, layer)

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"]
        count = family.config.lm.heads
        mask = mask.expand(-1, count, -1, -1).clone()
        for head in heads:
            mask[:, head].masked_fill_(torch.from_numpy(hidden), torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@contextlib.contextmanager
def removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
