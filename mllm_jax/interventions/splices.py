"""Splices: replace a site by its reconstruction from a dictionary, whose latents become a site.

A splice encodes its input, passes the latents through their tap, which edits and captures them, and
changes its site by the effect of the edited latents on the reconstruction. The layer of a splice is
data; the number of splices at a site is structure, so edits of latents have a leading axis over
splices, not over layers.

A cross-layer transcoder is in all layers, and the latents of a layer write to it and to all later
ones. The written values are carried from layer to layer, [L, B, T, E] by the layer that is written,
and each layer takes its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites
from mllm_jax.numerics import precision
from mllm_jax.sites import Selection, Site, SiteShape
from mllm_jax.typing import AnyArray, Array, Bool, Float, Int

if TYPE_CHECKING:
    from mllm_jax.interventions.edits import Edit


class Dictionary(Protocol):
    """A sparse autoencoder or a transcoder, as a splice uses it; a pytree."""

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of its input, of its latents and of its output."""

    def encode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B M"]:
        """Return the latents of x, in float32 or better."""

    def decode(self, latents: Float[Array, "*B M"], x: Float[Array, "*B D"]) -> Float[Array, ...]:
        """Return the reconstruction from latents, where x was encoded."""

    def decode_change(
        self, change: Float[Array, "*B M"], x: Float[Array, "*B D"]
    ) -> Float[Array, ...]:
        """Return the change of the reconstruction for a change of the latents."""


Layer = int | Int[AnyArray, ""]


@runtime_checkable
class CrossLayerDictionary(Protocol):
    """A cross-layer transcoder, as a splice uses it; a pytree."""

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of its input, of the latents of a layer and of its output."""

    @property
    def layers(self) -> int:
        """The number L of its layers."""

    def encode(self, x: Float[Array, "*B D"], layer: Layer) -> Float[Array, "*B M"]:
        """Return the latents of one layer, in float32 or better."""

    def write(self, latents: Float[Array, "*B M"], layer: Layer) -> Float[Array, "L *B E"]:
        """Return what the latents of one layer add to the reconstruction of each layer."""

    def constant(self, x: Float[Array, "*B D"], layer: Layer) -> Float[Array, ...]:
        """Return the part of the reconstruction of one layer that no latent adds."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Splice:
    """The dictionary and the settings of a splice.

    Attributes:
      dictionary: The dictionary.
      error: Whether to add the reconstruction error back. Static.
      reads: The site that is encoded. Static.
    """

    dictionary: Dictionary | CrossLayerDictionary
    error: bool = dataclasses.field(metadata={"static": True})
    reads: Site = dataclasses.field(metadata={"static": True})

    @property
    def crosses_layers(self) -> bool:
        """Whether latents write to later layers too."""
        return isinstance(self.dictionary, CrossLayerDictionary)

    @property
    def widest(self) -> int:
        """The size per token of its largest array: the latents, or those carried between layers."""
        _, latents, width = self.dictionary.widths
        if isinstance(self.dictionary, CrossLayerDictionary):
            return max(latents, self.dictionary.layers * width)
        return latents

    def carry(self, x: Float[Array, "B T ..."]) -> Float[Array, "L B T E"]:
        """Return the array that a cross-layer transcoder carries into the first layer.

        Args:
          x: The input of that layer.
        """
        assert isinstance(self.dictionary, CrossLayerDictionary), "others carry nothing"
        shape = self.dictionary.layers, *x.shape[:2], self.dictionary.widths[2]
        return jnp.zeros(shape, precision.at_least_float32_dtype(x.dtype))

    def encode(self, read: Float[Array, "B T ..."], layer: Layer | None) -> Float[Array, "B T M"]:
        """Return the latents of its input; the layer is needed for a cross-layer transcoder."""
        vectors = as_vectors(read)
        if isinstance(self.dictionary, CrossLayerDictionary):
            assert layer is not None, "it is in all layers"
            return self.dictionary.encode(vectors, layer)
        return self.dictionary.encode(vectors)

    def apply(
        self,
        x: Float[Array, "B T ..."],
        read: Float[Array, "B T ..."],
        before: Float[Array, "B T M"],
        after: Float[Array, "B T M"],
        layer: Layer | None = None,
        carried: Float[Array, "L B T E"] | None = None,
    ) -> tuple[Float[Array, "B T ..."], Float[Array, "L B T E"] | None]:
        """Return the site with the reconstruction from edited latents, and the carried array.

        With the error it is x - decode_change(before - after), which is x to the bit where no
        latent changed: a difference of equal numbers is +0, and so is its product.

        Args:
          x: The site.
          read: The encoded input.
          before: Its latents.
          after: The latents after their edits.
          layer: The layer, for a cross-layer transcoder.
          carried: The values that latents of earlier layers write to each layer; with the error,
            the values that their edits remove.
        """
        vectors, dictionary = as_vectors(read), self.dictionary
        wide = precision.at_least_float32(as_vectors(x))
        if isinstance(dictionary, CrossLayerDictionary):
            assert layer is not None and carried is not None, "they are of all layers"
            carried += dictionary.write(before - after if self.error else after, layer)
            here = carried[layer]
            y = wide - here if self.error else here + dictionary.constant(vectors, layer)
        elif self.error:
            y = wide - dictionary.decode_change(before - after, vectors)
        else:
            y = dictionary.decode(after, vectors)
        return y.reshape(x.shape).astype(x.dtype), carried


def as_vectors(x: Float[Array, "B T ..."]) -> Float[Array, "B T D"]:
    """Return one vector for each token, which joins the results of all heads."""
    return x.reshape(*x.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class LatentSite:
    """The latents of a site in a pass.

    Attributes:
      spec: Their shape, with `layers` of the site.
      layers: The layer of each splice, in the order of the splices.
    """

    spec: SiteShape
    layers: Int[AnyArray, " splices"]

    @property
    def is_known(self) -> bool:
        """Whether the layers are known."""
        return isinstance(self.layers, np.ndarray)

    def of_splices(self, units: Bool[AnyArray, "L M"]) -> Bool[AnyArray, "splices M"]:
        """Return the rows of a mask over layers that have a dictionary."""
        known = self.is_known and isinstance(units, np.ndarray)
        return units[self.layers] if known else jnp.asarray(units)[self.layers]

    def with_dictionary(self, units: Bool[np.ndarray, "L M"], name: str) -> Bool[np.ndarray, "L M"]:
        """Return a mask over layers without those that have no dictionary.

        Raises:
          ValueError: None of its layers has one.
        """
        here = np.zeros((len(units), 1), bool)
        here[self.layers] = True
        if not (units & here).any():
            raise ValueError(self.no_dictionary(name, "what is selected"))
        return units & here

    def selection(self, layers: Selection, name: str) -> Selection:
        """Return the layers of a capture, where "all" means those that have a dictionary.

        Raises:
          ValueError: One of the layers has no dictionary.
        """
        if layers.form == "all":
            return Selection("index", self.layers)
        if self.is_known and not isinstance(layers.value, jax.core.Tracer):
            wrong = np.setdiff1d(layers.indices(self.spec.layers, f"{name}: layer"), self.layers)
            if len(wrong):
                raise ValueError(self.no_dictionary(name, f"layer {wrong[0]}"))
        return layers

    def no_dictionary(self, name: str, where: str) -> str:
        """Return the message for layers without a dictionary."""
        have = ", ".join(map(str, self.layers)) if self.is_known else "those of the splices"
        return f"{name}: {where} has no dictionary; layers with one: {have}"


def latent_sites(
    edits: Iterable[Edit] | None, shapes: Mapping[str, SiteShape]
) -> dict[str, LatentSite]:
    """Return the latents of the splices of a pass, by the name of their site.

    Args:
      edits: All edits of the pass.
      shapes: The sites of the pass.

    Raises:
      ValueError: Two splices of a site have one layer, or dictionaries of unequal numbers of
        latents.
    """
    by_site: dict[Site, list[Edit]] = {}
    for edit in edits or ():
        if edit.splice is not None and edit.address.site.name in shapes:
            by_site.setdefault(edit.address.site, []).append(edit)
    return {s.latents.name: _latent_site(s, group, shapes) for s, group in by_site.items()}


def _latent_site(site: Site, splices: list[Edit], shapes: Mapping[str, SiteShape]) -> LatentSite:
    spec = shapes[site.name]
    dictionaries = [edit.splice.dictionary for edit in splices if edit.splice is not None]
    widths = {dictionary.widths[1] for dictionary in dictionaries}
    if len(widths) > 1:
        raise ValueError(
            f"the dictionaries at {site} have {' and '.join(map(str, sorted(widths)))} latents: "
            "in one pass they must have equally many"
        )
    layers = _layers(site, splices, spec.layers)
    if isinstance(layers, np.ndarray) and len(np.unique(layers)) < len(layers):
        raise ValueError(f"two dictionaries are spliced at one layer of {site}: {layers.tolist()}")
    dtype = np.dtype(precision.at_least_float32_dtype(spec.dtype))
    shape = SiteShape(spec.layers, (*spec.shape[:2], *widths), dtype)
    return LatentSite(shape, layers)


def _layers(site: Site, splices: list[Edit], count: int) -> Int[AnyArray, " splices"]:
    if any(edit.splice is not None and edit.splice.crosses_layers for edit in splices):
        if len(splices) > 1:
            raise ValueError(
                f"a cross-layer transcoder is spliced at {site}: it must be the only splice there"
            )
        return np.arange(count, dtype=np.int32)
    given = [edit.address.layers.value if site.stacked else np.int32(0) for edit in splices]
    if any(isinstance(layer, jax.core.Tracer) for layer in given):
        return jnp.stack([jnp.asarray(layer, jnp.int32) % count for layer in given])
    numbers = [edit.address.layers.indices(count, f"{site}: layer")[0] for edit in splices]
    return np.array(numbers, np.int32)


def check_splice(edit: Edit, shapes: Mapping[str, SiteShape]) -> None:
    """Check that a dictionary fits the site that it reads and the site that it is spliced at.

    Raises:
      ValueError: It does not fit.
    """
    assert edit.splice is not None, "a splice has a dictionary"
    site, reads = edit.address.site, edit.splice.reads
    if reads.name not in shapes:
        raise ValueError(f"this pass has no site {reads}, which the splice at {site} reads")
    known = list(sites.BY_NAME)
    in_layer = reads.module == site.module and reads.stacked and site.stacked
    earlier = known.index(reads.name) < known.index(site.name)
    if reads != site and not (in_layer and earlier):
        raise ValueError(
            f"the splice at {site} reads {reads}, which is no earlier site of the same layer"
        )
    dictionary = edit.splice.dictionary
    count = shapes[site.name].layers
    if isinstance(dictionary, CrossLayerDictionary) and dictionary.layers != count:
        raise ValueError(
            f"the cross-layer transcoder at {site} has {dictionary.layers} layers, and the model "
            f"has {count}"
        )
    sizes = [int(np.prod(shapes[s.name].shape[2:])) for s in (reads, site)]
    width_in, _, width_out = dictionary.widths
    if sizes != [width_in, width_out]:
        raise ValueError(
            f"the dictionary at {site} reads vectors of {width_in} and returns {width_out}, but "
            f"{reads} has {sizes[0]} and {site} has {sizes[1]}"
        )
