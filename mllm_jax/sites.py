"""Sites: the named tensors of a forward pass, and addresses within them.

A site is static: `sites.lm.mlp.act`. A misspelt one is an error that lists the nearest names.
What stands in brackets is an address: layers, then neurons (channels, heads), and is data:
`sites.lm.mlp.act[12, neurons]`, `sites.lm.resid_post[18:24]`, `sites.lm.mlp.act[mask]`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_ABOVE = "; layers above the feature layer never reach the LM, so they are not run"
END = 2**30  # an open end of a slice


@dataclasses.dataclass(frozen=True)
class Site:
    """One named tensor.

    Attributes:
      name: dotted name, the module first.
      shape: the axes of the tensor in one layer, in axis letters.
      about: where it is read and written.
      stacked: whether the site exists once per layer.
      lens: the TransformerLens name, for people who come from there.
      hf: the tensor in HF transformers, for people who come from there; where InstructBLIP names it
        otherwise, its name comes second.
    """

    name: str
    shape: str
    about: str
    stacked: bool = True
    lens: str = ""
    hf: str = ""

    @property
    def module(self) -> str:
        return self.name.split(".")[0]

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.shape.split())

    def entry(self, table: Mapping[str, Any]) -> Any:
        """What a table by module says of this site; its own line, where it has one, comes first."""
        return table[self.name if self.name in table else self.module]

    def __getitem__(self, item) -> Address:
        return Address.parse(self, item)

    def __str__(self) -> str:
        return self.name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Some entries of one axis, as data: all, a range, a list of indices, or a mask.

    Attributes:
      form: "all", "one", "range", "index" or "mask". Static.
      value: int32[] for one, int32[3] for a range, int32[n] for indices, bool[n] for a mask.
    """

    form: str = dataclasses.field(metadata={"static": True})
    value: Any = None

    @classmethod
    def parse(cls, item) -> Selection:
        if item is None or (isinstance(item, slice) and item == slice(None)):
            return cls("all")
        if isinstance(item, slice):
            if (item.step or 1) < 1:
                raise ValueError(f"slice {item} of an address: the step must be positive")
            stop = END if item.stop is None else item.stop
            return cls("range", np.array([item.start or 0, stop, item.step or 1], np.int32))
        array = as_array(item)
        if array.dtype == bool:
            return cls("mask", array)
        if array.size == 0:
            return cls("index", np.zeros((0,), np.int32))
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"an address holds integers, slices or masks, not {array.dtype}")
        return cls("one" if array.ndim == 0 else "index", array.astype(np.int32))

    def mask(self, size: int, what: str) -> Any:
        """bool[size], or the mask itself. Indices out of range are an error where they are known.

        Args:
          size: length of the axis.
          what: what the axis is, for the error: "lm.mlp.act: layer".
        """
        if self.form == "all":
            return np.ones((size,), bool)
        if self.form == "mask":
            if self.value.shape[-1] != size:
                raise ValueError(
                    f"{what} mask has {self.value.shape[-1]} entries, the model has {size}"
                )
            return self.value
        xp = np if _concrete(self.value) else jax.numpy
        if self.form == "range":
            start, stop, step = self.value[0], self.value[1], self.value[2]
            at = xp.arange(size)
            start = xp.maximum(xp.where(start < 0, start + size, start), 0)
            stop = xp.where(stop < 0, stop + size, stop)
            return (at >= start) & (at < stop) & ((at - start) % step == 0)
        index = xp.atleast_1d(self.value)
        if xp is np and index.size and (index.min() < -size or index.max() >= size):
            wrong = index[(index < -size) | (index >= size)][0]
            note = _ABOVE if what.startswith("vision.") and what.endswith("layer") else ""
            raise ValueError(
                f"{what} {wrong} is out of range: the model has {size} (0 to {size - 1}){note}"
            )
        return (xp.arange(size)[:, None] == index[None, :] % size).any(1)

    def indices(self, size: int, what: str) -> np.ndarray:
        """int32[n] of a selection whose number of entries must be static, as a capture needs."""
        if self.form == "mask" and self.value.ndim > 1:
            raise ValueError(f"{what}: a capture takes the same units in every layer, not a mask")
        if self.form in ("index", "one"):
            self.mask(size, what)
            xp = np if _concrete(self.value) else jax.numpy
            return xp.atleast_1d(self.value) % size
        if not _concrete(self.value):
            raise ValueError(f"{what}: a capture under jit takes indices or all, not a {self.form}")
        return np.flatnonzero(self.mask(size, what)).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Address:
    """A site with the layers and the neurons that are meant."""

    site: Site = dataclasses.field(metadata={"static": True})
    layers: Selection = Selection("all")
    units: Selection = Selection("all")

    @classmethod
    def of(cls, target) -> Address:
        """A site, an address, or a mask bool[L, F], which stands for `lm.mlp.act[mask]`."""
        if isinstance(target, Address):
            return target
        if isinstance(target, Site):
            return cls(target)
        if isinstance(target, Namespace):
            return cls(target._own_site())
        if _is_mask(target):
            return lm.mlp.act[target]
        raise TypeError(
            f"expected a site such as sites.lm.mlp.act, an address or a mask bool[L, F], "
            f"got {type(target).__name__}"
        )

    @classmethod
    def parse(cls, site: Site, item) -> Address:
        parts = item if isinstance(item, tuple) else (item,)
        if not site.stacked:
            if len(parts) != 1:
                raise IndexError(f"{site} exists once, not per layer: its address is [neurons]")
            return cls(site, units=Selection.parse(parts[0]))
        if len(parts) > 2:
            raise IndexError(f"an address is {site}[layers, neurons], got {len(parts)} parts")
        first = parts[0]
        if _is_mask(first) and first.ndim == 2:
            if len(parts) > 1:
                raise IndexError(f"{site}[mask] with a mask bool[L, F] takes no second part")
            return cls(site, units=Selection("mask", first))
        return cls(site, *(Selection.parse(part) for part in parts))

    def mask(self, layers: int, width: int) -> Any:
        """bool[L, width], or bool[L, 1] where all units are meant; NumPy where it can be."""
        name = self.site.name
        units = self.units
        rows = self.layers.mask(layers, f"{name}: layer")[:, None]
        if units.form == "mask" and units.value.ndim == 2:
            if tuple(units.value.shape) != (layers, width):
                raise ValueError(
                    f"{name}: the mask is {tuple(units.value.shape)}, "
                    f"the model has {layers} layers of {width}"
                )
            return rows & units.value
        if units.form == "all":
            return rows
        return rows & units.mask(width, f"{name}: unit")[None, :]


def _is_mask(value) -> bool:
    return hasattr(value, "dtype") and value.dtype == np.bool_


def _concrete(value) -> bool:
    return not isinstance(value, jax.core.Tracer)


def as_array(value) -> Any:
    """What a user gave as an array: NumPy's, or JAX's where it is one or holds traced values."""
    if isinstance(value, jax.Array):
        return value
    if all(_concrete(leaf) for leaf in jax.tree.leaves(value)):
        return np.asarray(value)
    return jax.numpy.asarray(value)


class Namespace:
    """A branch of the site tree: attributes are sites or further branches."""

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._entries: dict[str, Any] = {}

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._entries:
            return self._entries[name]
        raise AttributeError(unknown(f"{self._prefix}.{name}"))

    def __dir__(self):
        return list(self._entries)

    def __getitem__(self, item) -> Address:
        return self._own_site()[item]

    def _own_site(self) -> Site:
        # `lm.attn[10:]` in a knockout means the attention mask of those layers.
        if "mask" not in self._entries:
            known = ", ".join(self._entries)
            raise AttributeError(f"'{self._prefix}' is a group of sites: {known}")
        return self._entries["mask"]

    def __repr__(self) -> str:
        return f"<sites {self._prefix}: {', '.join(self._entries)}>"


TABLE: tuple[Site, ...] = (
    Site("vision.embed", "I P E", "patches with positions; CLIP's after its first norm", False,
         "hook_full_embed",
         "vision_model.pre_layrnorm (output); vision_model.embeddings (output)"),
    Site("vision.resid_pre", "I P E", "what enters a block", True,
         "blocks.{i}.hook_resid_pre", "vision_model.encoder.layers.{i} (input)"),
    Site("vision.attn_out", "I P E", "attention output, before it is added", True,
         "blocks.{i}.hook_attn_out", "vision_model.encoder.layers.{i}.self_attn (output)"),
    Site("vision.mlp.act", "I P F", "neurons: activation of fc1", True,
         "blocks.{i}.mlp.hook_post", "vision_model.encoder.layers.{i}.mlp.activation_fn (output)"),
    Site("vision.mlp.out", "I P E", "MLP output, before it is added", True,
         "blocks.{i}.hook_mlp_out", "vision_model.encoder.layers.{i}.mlp (output)"),
    Site("vision.resid_post", "I P E", "what leaves a block", True,
         "blocks.{i}.hook_resid_post", "vision_model.encoder.layers.{i} (output)"),
    Site("qformer.mlp.act", "I T F",
         "neurons of the text branch; dead in the last layer, as only queries leave", True,
         "", "qformer.encoder.layer.{i}.intermediate (output)"),
    Site("qformer.query_mlp.act", "I Q F", "neurons of the query branch", True,
         "", "qformer.encoder.layer.{i}.intermediate_query (output)"),
    Site("qformer.resid_post", "I T W", "what leaves a block, normed: queries, then text", True,
         "", "qformer.encoder.layer.{i} (output)"),
    Site("projector.act", "I P F", "neurons: activation between two linear maps", True,
         "", "multi_modal_projector.act (output)"),
    Site("projector.out", "I P D", "image tokens in the LM's space", False,
         "", "multi_modal_projector (output); language_projection (output)"),
    Site("lm.embed", "B T D", "text and image embeddings, merged", False,
         "hook_embed", "language_model.model (inputs_embeds)"),
    Site("lm.resid_pre", "B T D", "what enters a block", True,
         "blocks.{i}.hook_resid_pre", "language_model.model.layers.{i} (input)"),
    Site("lm.attn.mask", "B N T S", "boolean attention mask, for knockout", True,
         "", "attention_mask"),
    Site("lm.attn.pattern", "B N T S", "attention probabilities", True,
         "blocks.{i}.attn.hook_pattern", "language_model.model.layers.{i}.self_attn (weights)"),
    Site("lm.attn.heads", "B T N H", "each head's result, before the output map", True,
         "blocks.{i}.attn.hook_z", "language_model.model.layers.{i}.self_attn.o_proj (input)"),
    Site("lm.attn_out", "B T D", "attention output, before it is added", True,
         "blocks.{i}.hook_attn_out", "language_model.model.layers.{i}.self_attn (output)"),
    Site("lm.resid_mid", "B T D", "residual between attention and MLP", True,
         "blocks.{i}.hook_resid_mid",
         "language_model.model.layers.{i}.post_attention_layernorm (input)"),
    Site("lm.mlp.gate", "B T F", "gate before its activation", True,
         "blocks.{i}.mlp.hook_pre", "language_model.model.layers.{i}.mlp.gate_proj (output)"),
    Site("lm.mlp.act", "B T F", "neurons: silu(gate), before the product with up", True,
         "", "language_model.model.layers.{i}.mlp.act_fn (output)"),
    Site("lm.mlp.gated", "B T F", "silu(gate) * up, what enters the down map", True,
         "blocks.{i}.mlp.hook_post", "language_model.model.layers.{i}.mlp.down_proj (input)"),
    Site("lm.mlp.out", "B T D", "MLP output, before it is added", True,
         "blocks.{i}.hook_mlp_out", "language_model.model.layers.{i}.mlp (output)"),
    Site("lm.resid_post", "B T D", "what leaves a block", True,
         "blocks.{i}.hook_resid_post", "language_model.model.layers.{i} (output)"),
    Site("lm.norm", "B T D", "final norm, what the head reads", False,
         "ln_final.hook_normalized", "language_model.model.norm (output)"),
    Site("logits", "B T V", "next-token logits", False, "", "logits"),
)  # fmt: skip

BY_NAME = {site.name: site for site in TABLE}


def unknown(name: str) -> str:
    """The one line said of a name that is no site."""
    near = difflib.get_close_matches(name, BY_NAME, n=3, cutoff=0.4) or list(BY_NAME)
    return f"unknown site '{name}'; nearest: {', '.join(near)} (sites.TABLE lists all)"


def get(name: str) -> Site:
    """The site of a dotted name.

    Raises:
      KeyError: no such site; the message lists the nearest names.
    """
    if name not in BY_NAME:
        raise KeyError(unknown(name))
    return BY_NAME[name]


def _tree() -> dict[str, Any]:
    root = Namespace("sites")
    for site in TABLE:
        *branches, leaf = site.name.split(".")
        node = root
        for depth, branch in enumerate(branches):
            prefix = ".".join(branches[: depth + 1])
            node = node._entries.setdefault(branch, Namespace(prefix))
        node._entries[leaf] = site
    return root._entries


_ROOT = _tree()
vision: Namespace = _ROOT["vision"]
qformer: Namespace = _ROOT["qformer"]
projector: Namespace = _ROOT["projector"]
lm: Namespace = _ROOT["lm"]
logits: Site = _ROOT["logits"]


def __getattr__(name: str):
    raise AttributeError(unknown(name))
