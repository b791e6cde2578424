"""The base of all families: image tokens merged into those of a language model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import notebook, sites, tokens
from mllm_jax.batch import Batch, Layout
from mllm_jax.models.cache import Cache
from mllm_jax.models.decoder import Block, Decoder, DecoderConfig
from mllm_jax.models.projector import Projector, ProjectorConfig
from mllm_jax.models.vit import Vit, VitConfig
from mllm_jax.positions import Positions
from mllm_jax.sharding import collectives
from mllm_jax.typing import Array, Bool, Float

Size = tuple[int, int]  # height, width


def require_size(size: Size | None, reads: str) -> Size:
    """Return the (height, width) of a picture, which its layout needs.

    Args:
      size: The size, or None if features replace the picture.
      reads: How the model reads a picture, for the error.

    Raises:
      ValueError: The size is not known.
    """
    if size is None:
        raise ValueError(
            f"{reads}: with features= also give sizes=[(height, width), ...] of the pictures"
        )
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultimodalConfig(abc.ABC):
    """The config of a model of any family.

    Attributes:
      vision: The vision tower.
      projector: The projector from the tower, or from the Q-Former, to the language model.
      lm: The language model.
      image_token: The id of an image token in the text.
      pinpoints: The resolutions (height, width) at which an image may be cut into tiles; empty if
        each image is one square.
      attends_forward: The tokens with bidirectional attention to each other: those of a picture,
        those of the prompt, or none.
    """

    vision: VitConfig
    projector: ProjectorConfig
    lm: DecoderConfig
    image_token: int = 32000
    pinpoints: ClassVar[tuple[Size, ...]] = ()
    attends_forward: ClassVar[Literal["none", "picture", "prompt"]] = "none"

    @property
    @abc.abstractmethod
    def image_tokens(self) -> int:
        """The number of tokens of one tile in the language model."""

    def tile_tokens(self, batch: Batch) -> int:
        """Return the padded number of tokens of each tile of a batch in the LM."""
        del batch
        return self.image_tokens

    @property
    @abc.abstractmethod
    def token_grid(self) -> int:
        """The side of the square grid of the tokens of a tile; 0 if there is none."""

    @abc.abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> MultimodalModel:
        """Return the network with random weights."""

    @property
    def tile_side(self) -> int | None:
        """The side of the squares that the tower reads; None if pictures keep their own size."""
        return self.vision.image_size

    @property
    def pixel_shape(self) -> Size | tuple[int, int, int]:
        """The shape of the pixels of a tile, of the largest one if sizes differ."""
        return (self.vision.image_size, self.vision.image_size, 3)

    @property
    def depends_on_size(self) -> bool:
        """Whether the layout of an image depends on its size."""
        return self.tile_side is None or self.tiles > 1

    @property
    def tiles(self) -> int:
        """The number of tiles to which an image is padded in a batch."""
        return 1

    @property
    def largest(self) -> Size:
        """The (height, width) of an image with the largest number of tokens."""
        return (self.vision.image_size,) * 2

    def layout(self, size: Size | None = None) -> Layout:
        """Return the layout of an image of this (height, width)."""
        del size
        return Layout(1, np.arange(self.image_tokens))

    def readers(self, batch: Batch) -> Bool[Array, "B I"]:
        """Return which tiles each row reads: all those of each of its images."""
        xp: Any = np if isinstance(batch.image_token_index, np.ndarray) else jnp
        rows, tiles = len(batch.image_token_index), len(batch.tile)
        # The tile of a token: negative for text, beyond the last tile for a newline.
        tile = batch.image_token_index // max(1, self.tile_tokens(batch))
        at = np.arange(rows)[:, None], xp.where((tile >= 0) & (tile < tiles), tile, tiles)
        read = xp.zeros((rows, tiles + 1), bool)
        if xp is np:
            read[at] = True
        else:
            read = read.at[at].set(True)
        # A tile of only padding has no token in the LM, but its image is read.
        slot = xp.cumsum(batch.tile == 0)
        return (read[:, :tiles, None] & (slot[:, None] == slot)).any(1)


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """The image tokens of a batch, tile by tile, followed by tokens that all rows share.

    Attributes:
      tokens: The embeddings that the language model reads in place of word embeddings, [n, D].
      deepstack: The features added to the states after each of its first k layers, [k, n, D]; or
        None.
    """

    tokens: Float[Array, "n D"]
    deepstack: Float[Array, "k n D"] | None = None


class MultimodalModel(nnx.Module):
    """A network of any family: a vision tower, a projector and a language model.

    Attributes:
      config: The config that built it.
      vision: The vision tower.
      projector: The projector.
      lm: The language model.
    """

    config: MultimodalConfig
    vision: Vit
    projector: Projector
    lm: Decoder

    def __init__(self, config: MultimodalConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = config.vision.build(rngs=rngs)
        self.projector = Projector(config.projector, rngs=rngs)
        self.lm = Decoder(config.lm, rngs=rngs)

    def _repr_html_(self) -> str:
        return notebook.model(self)

    def token_maps(self, batch: Batch) -> dict[str, tokens.TokenMap]:
        """Return the token map of each module by its name."""
        raise NotImplementedError

    def with_readers(
        self, batch: Batch, maps: dict[str, tokens.TokenMap]
    ) -> dict[str, tokens.TokenMap]:
        """Return maps of tiles that know which rows of the batch read them."""
        readers = self.config.readers(batch)
        return {name: dataclasses.replace(map_, readers=readers) for name, map_ in maps.items()}

    def unshared(self, batch: Batch) -> Batch:
        """Return the batch with separate tiles for each row, or itself if rows share none.

        A traced batch is returned unchanged, because the number of tiles must be known.
        """
        known = self.config.readers(batch)
        if isinstance(known, jax.core.Tracer):
            return batch
        readers = np.asarray(known)
        if (readers.sum(0) <= 1).all():
            return batch
        rows, size = len(readers), int(np.max(batch.tile)) + 1  # places for tiles in each row
        first = readers.argmax(1) // size * size  # the tiles of a row are adjacent
        at = (first[:, None] + np.arange(size)).reshape(-1)
        real = np.asarray(batch.is_real_tile)[at] & np.repeat(readers.any(1), size)

        def copy_tiles(array, fill=0):
            if array is None or not len(array):
                return array
            array = np.asarray(array)[at]
            return np.where(real.reshape(-1, *(1,) * (array.ndim - 1)), array, fill)

        tile_tokens = self.config.tile_tokens(batch)

        step = (np.arange(rows) - first // size) * size * tile_tokens
        places = len(batch.tile) * tile_tokens, rows * size * tile_tokens
        return batch.move_image_tokens(step, *places).replace(
            pixels=copy_tiles(batch.pixels),
            grid=copy_tiles(batch.grid),
            tile=np.asarray(batch.tile)[at],
            is_real_tile=real,
            features=copy_tiles(batch.features),
            qformer_ids=copy_tiles(batch.qformer_ids),
            qformer_kind=copy_tiles(batch.qformer_kind, tokens.CODE["pad"]),
            shares_tiles=False,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the vision tower."""
        return self.vision.patch.kernel[...].dtype

    def features(self, batch: Batch, taps) -> Float[Array, "I P E"]:
        """Return the features of the vision tower that the projector reads."""
        if batch.features is not None:
            return jnp.asarray(batch.features, self.dtype)
        inputs = [jnp.asarray(batch.pixels, self.dtype)]
        inputs += [] if batch.grid is None else [jnp.asarray(batch.grid)]
        tower: Callable[..., Array] = self.vision  # those of free grids read the grid as well
        return tower(*inputs, taps.module("vision"))

    def images(self, batch: Batch, taps) -> ImageTokens:
        """Return the image tokens of all tiles in the order that `image_token_index` counts."""
        features = self.features(batch, taps)
        tap = taps.module("projector", lens=self.lm.lens)
        images, deepstack = self.projector(features, tap), None
        if self.config.projector.deepstack:
            deepstack = self.projector.deepstack_tokens(features, tap)
            deepstack = deepstack.reshape(len(deepstack), -1, deepstack.shape[-1])
        return ImageTokens(images.reshape(-1, images.shape[-1]), deepstack)

    def embed(
        self, batch: Batch, taps
    ) -> tuple[Float[Array, "B T D"], Float[Array, "k B T D"] | None]:
        """Return word embeddings with the image tokens merged, and the features of DeepStack."""
        words = self.lm.embeddings(batch.ids)
        tap = taps.module("lm", lens=self.lm.lens)
        if not len(batch.is_real_tile):  # only text: run neither vision nor projector
            return tap(sites.lm.embed, words), None
        images, is_image = self.images(batch, taps), (batch.image_token_index >= 0)[..., None]
        merged = jnp.where(is_image, _take(images.tokens, batch).astype(words.dtype), words)
        deepstack = images.deepstack
        if deepstack is not None:
            taken = jnp.stack([_take(tokens, batch) for tokens in deepstack])
            deepstack = jnp.where(is_image, taken, 0)
        return tap(sites.lm.embed, merged), deepstack

    def __call__(self, batch: Batch, taps) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the final normalised states of every token, and the cache."""
        x, deepstack = self.embed(batch, taps)
        return self.read(x, batch.positions, taps, deepstack=deepstack)

    def read(
        self,
        x: Float[Array, "B T D"],
        positions: Positions,
        taps,
        past: Cache | None = None,
        deepstack: Float[Array, "k B T D"] | None = None,
        layers: tuple[Block, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run the language model on merged embeddings; see `Decoder`."""
        tap = taps.module("lm", lens=self.lm.lens)
        return self.lm(x, positions, tap, past, deepstack, layers)

    def logits(self, x: Float[Array, "B T D"], taps) -> Float[Array, "B T V"]:
        """Return the float32 logits of normalised states."""
        return taps.module("logits")(sites.logits, self.lm.logits(x))


def _take(images: Float[Array, "n D"], batch: Batch) -> Float[Array, "B T D"]:
    """Return the image token at each position; the value at other positions is arbitrary."""
    tiles = len(batch.is_real_tile)

    def take(index):
        return collectives.take_image_tokens(
            images, jnp.maximum(index, 0), tiles, batch.shares_tiles
        )

    interpolation = batch.interpolation
    if interpolation is None:
        return take(batch.image_token_index)
    return sum(
        take(interpolation.index[..., n]) * interpolation.weight[..., n, None].astype(images.dtype)
        for n in range(interpolation.index.shape[-1])
    )
