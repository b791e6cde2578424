"""Sites: the named tensors of a forward pass, and addresses within them.

A site is static: `sites.lm.mlp.act`. A misspelt site raises an error that lists the nearest names.
The brackets after a site hold an address: layers, then neurons (channels, heads). An address is
data: `sites.lm.mlp.act[12, neurons]`, `sites.lm.resid_post[18:24]`, `sites.lm.mlp.act[mask]`. It
means these neurons in each of these layers; single neurons of several layers are pairs int[n, 2],
`sites.lm.mlp.act[[(0, 5), (1, 6)]]`. See `Address`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from mllm_jax.addresses import Address as Address
    from mllm_jax.addresses import Target as Target
    from mllm_jax.selections import Selection as Selection
    from mllm_jax.selections import as_array as as_array

# Members that need JAX, unlike this module: they are imported when they are first read.
_IN_ADDRESSES = ("Address", "Selection", "Target", "as_array")
LATENTS = ".latents"


@dataclasses.dataclass(frozen=True)
class Site:
    """One named tensor.

    Attributes:
      name: The dotted name, with the module first.
      shape: The axes of the tensor in one layer, in axis letters.
      about: A description of the tensor.
      stacked: Whether the site exists once per layer.
      transformer_lens_name: The name in TransformerLens; "" if it has none.
      hf: The name of the tensor in transformers; if InstructBLIP has another name for it, that name
        comes second.
      keys: The module whose tokens are the keys S of an attention to another module; "" if they are
        those of the site's own module.
    """

    name: str
    shape: str
    about: str
    stacked: bool = True
    transformer_lens_name: str = ""
    hf: str = ""
    keys: str = ""

    @property
    def module(self) -> str:
        """The module that the site belongs to."""
        return self.name.split(".")[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axis letters of the tensor in one layer."""
        return tuple(self.shape.split())

    @property
    def unit_axis(self) -> int:
        """The axis of the units: the first axis that is neither rows nor tokens."""
        return next(i for i, axis in enumerate(self.axes) if axis not in "BITPSQ")

    @property
    def token_axis(self) -> int:
        """The axis of the tokens."""
        return next(i for i, axis in enumerate(self.axes) if axis in "TPQ")

    @property
    def latents(self) -> Site:
        """The latents of the dictionary that is spliced here, see `edits.splice`.

        They are addressed like the site: `lm.resid_post.latents[14, [17, 93]]`.

        Raises:
          AttributeError: The site has no vector for each token that a dictionary could read.
        """
        if not self.has_latents:
            raise AttributeError(f"no dictionary reads {self}, which is [{self.shape}]")
        shape = " ".join((*self.axes[:2], "M"))
        return Site(f"{self}{LATENTS}", shape, f"latents of a dictionary at {self}", self.stacked)

    @property
    def has_latents(self) -> bool:
        """Whether a dictionary can be spliced here: the site has one vector for each token."""
        is_vector = not self.is_latents and self.token_axis == 1 and "S" not in self.axes
        return is_vector and self.module != "logits"

    @property
    def is_latents(self) -> bool:
        """Whether the site is the latents of another."""
        return self.name.endswith(LATENTS)

    @property
    def lens(self) -> str:
        """The old name of `transformer_lens_name`."""
        message = (
            "Site.lens is now Site.transformer_lens_name; the old name will be removed in the next "
            "release"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.transformer_lens_name

    def entry(self, table: Mapping[str, Any]) -> Any:
        """Return the entry of this site in a table by site or module; a site takes precedence."""
        return table[self.name if self.name in table else self.module]

    def key_entry(self, table: Mapping[str, Any]) -> Any:
        """Return the entry of the keys of an attention in a table by site or module."""
        return table[self.keys] if self.keys else self.entry(table)

    def check_parts(self, count: int) -> None:
        """Check the number of parts in the brackets of an address.

        Raises:
          IndexError: The site has no such address.
        """
        if not self.stacked and count != 1:
            raise IndexError(f"{self} exists once, not per layer: its address is [neurons]")
        if count > 2:
            raise IndexError(f"an address is {self}[layers, neurons], got {count} parts")

    def __getitem__(self, item) -> Address:
        return _addresses().Address.parse(self, item)

    def __str__(self) -> str:
        return self.name

    def _repr_html_(self) -> str:
        return importlib.import_module("mllm_jax.notebook").site(self)


@dataclasses.dataclass(frozen=True)
class SiteShape:
    """The tensor of a site in a model.

    Attributes:
      layers: The number of layers that have the site.
      shape: The shape of the tensor in one layer.
      dtype: Its dtype.
    """

    layers: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Namespace:
    """A branch of the site tree: attributes are sites or further branches."""

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._entries: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
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
    Site("vision.resid_pre", "I P E", "residual at the input of a block", True,
         "blocks.{i}.hook_resid_pre", "vision_model.encoder.layers.{i} (input)"),
    Site("vision.attn.mask", "I N P S", "boolean attention mask, for knockout", True,
         "", "attention_mask"),
    Site("vision.attn.pattern", "I N P S", "attention probabilities", True,
         "blocks.{i}.attn.hook_pattern",
         "vision_model.encoder.layers.{i}.self_attn (weights)"),
    Site("vision.attn.heads", "I P N H", "output of each head, before the output projection", True,
         "blocks.{i}.attn.hook_z",
         "vision_model.encoder.layers.{i}.self_attn.out_proj (input); "
         "vision_model.encoder.layers.{i}.self_attn.projection (input)"),
    Site("vision.attn_out", "I P E", "attention output, before it is added", True,
         "blocks.{i}.hook_attn_out", "vision_model.encoder.layers.{i}.self_attn (output)"),
    Site("vision.mlp.act", "I P F", "neurons: activation of fc1", True,
         "blocks.{i}.mlp.hook_post", "vision_model.encoder.layers.{i}.mlp.activation_fn (output)"),
    Site("vision.mlp.out", "I P E", "MLP output, before it is added", True,
         "blocks.{i}.hook_mlp_out", "vision_model.encoder.layers.{i}.mlp (output)"),
    Site("vision.resid_post", "I P E", "residual at the output of a block", True,
         "blocks.{i}.hook_resid_post", "vision_model.encoder.layers.{i} (output)"),
    Site("qformer.attn.pattern", "I N T S",
         "attention probabilities of queries, then text, among themselves", True,
         "", "qformer.encoder.layer.{i}.attention.attention (weights)"),
    Site("qformer.cross.pattern", "I N Q S",
         "attention probabilities of queries on patches; 0 in layers without it", True,
         "", "qformer.encoder.layer.{i}.crossattention.attention (weights)", keys="vision"),
    Site("qformer.mlp.act", "I T F",
         "neurons of the text branch; dead in the last layer, which returns only queries", True,
         "", "qformer.encoder.layer.{i}.intermediate (output)"),
    Site("qformer.query_mlp.act", "I Q F", "neurons of the query branch", True,
         "", "qformer.encoder.layer.{i}.intermediate_query (output)"),
    Site("qformer.resid_post", "I T W", "normalised output of a block: queries, then text", True,
         "", "qformer.encoder.layer.{i} (output)"),
    Site("projector.act", "I P F", "neurons: activation between two linear maps", True,
         "", "multi_modal_projector.act (output)"),
    Site("projector.out", "I P D", "image tokens in the LM's space", False,
         "", "multi_modal_projector (output); language_projection (output)"),
    Site("projector.deepstack", "I P D", "features added to image tokens after an LM layer", True,
         "", "model.visual.deepstack_merger_list.{i} (output)"),
    Site("lm.embed", "B T D", "text and image embeddings, merged", False,
         "hook_embed", "language_model.model (inputs_embeds)"),
    Site("lm.resid_pre", "B T D", "residual at the input of a block", True,
         "blocks.{i}.hook_resid_pre", "language_model.model.layers.{i} (input)"),
    Site("lm.attn.q", "B T N H", "queries by head, before their norm and their rotation", True,
         "blocks.{i}.attn.hook_q", "language_model.model.layers.{i}.self_attn.q_proj (output)"),
    Site("lm.attn.k", "B T K H", "keys by head, before their norm and their rotation", True,
         "blocks.{i}.attn.hook_k", "language_model.model.layers.{i}.self_attn.k_proj (output)"),
    Site("lm.attn.v", "B T K H", "values by head", True,
         "blocks.{i}.attn.hook_v", "language_model.model.layers.{i}.self_attn.v_proj (output)"),
    Site("lm.attn.mask", "B N T S", "boolean attention mask, for knockout", True,
         "", "attention_mask"),
    Site("lm.attn.pattern", "B N T S", "attention probabilities", True,
         "blocks.{i}.attn.hook_pattern", "language_model.model.layers.{i}.self_attn (weights)"),
    Site("lm.attn.heads", "B T N H", "output of each head, before the output projection", True,
         "blocks.{i}.attn.hook_z", "language_model.model.layers.{i}.self_attn.o_proj (input)"),
    Site("lm.attn_out", "B T D", "attention output, before it is added", True,
         "blocks.{i}.hook_attn_out", "language_model.model.layers.{i}.self_attn (output)"),
    Site("lm.resid_mid", "B T D", "residual between attention and MLP", True,
         "blocks.{i}.hook_resid_mid",
         "language_model.model.layers.{i}.post_attention_layernorm (input)"),
    Site("lm.mlp.input", "B T D", "input of the MLP: the normalised residual", True,
         "", "language_model.model.layers.{i}.mlp (input)"),
    Site("lm.mlp.gate", "B T F", "gate before its activation", True,
         "blocks.{i}.mlp.hook_pre", "language_model.model.layers.{i}.mlp.gate_proj (output)"),
    Site("lm.mlp.act", "B T F", "neurons: silu(gate), before the product with up", True,
         "", "language_model.model.layers.{i}.mlp.act_fn (output)"),
    Site("lm.mlp.gated", "B T F", "silu(gate) * up, the input of the down projection", True,
         "blocks.{i}.mlp.hook_post", "language_model.model.layers.{i}.mlp.down_proj (input)"),
    Site("lm.mlp.out", "B T D", "MLP output, before it is added", True,
         "blocks.{i}.hook_mlp_out", "language_model.model.layers.{i}.mlp (output)"),
    Site("lm.resid_post", "B T D", "residual at the output of a block", True,
         "blocks.{i}.hook_resid_post", "language_model.model.layers.{i} (output)"),
    Site("lm.norm", "B T D", "output of the final norm, which the head reads", False,
         "ln_final.hook_normalized", "language_model.model.norm (output)"),
    Site("logits", "B T V", "next-token logits", False, "", "logits"),
)  # fmt: skip

BY_NAME = {site.name: site for site in TABLE}
MASKS = tuple(site for site in TABLE if site.name.endswith(".attn.mask"))
PATTERNS = tuple(site for site in TABLE if site.name.endswith(".pattern"))


def unknown(name: str) -> str:
    """Return the error message for a name that is not a site."""
    near = difflib.get_close_matches(name, BY_NAME, n=5, cutoff=0.4) or list(BY_NAME)
    return f"unknown site '{name}'; nearest: {', '.join(near)} (sites.TABLE lists all)"


def get(name: str) -> Site:
    """Return the site of a dotted name.

    Raises:
      KeyError: There is no such site; the message lists the nearest names.
    """
    base = name.removesuffix(LATENTS)
    if base not in BY_NAME:
        raise KeyError(unknown(base))
    return BY_NAME[name] if base == name else BY_NAME[base].latents


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


def _addresses() -> Any:
    return importlib.import_module("mllm_jax.addresses")


def __getattr__(name: str):
    if name in _IN_ADDRESSES:
        return getattr(_addresses(), name)
    raise AttributeError(unknown(name))
