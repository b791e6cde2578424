"""LLaVA (Liu et al. 2023): vision tower, projector, language model, image tokens in place."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import sites, tokens
from mllm_jax.batch import Batch, Layout
from mllm_jax.models.cache import Cache
from mllm_jax.models.clip import ClipConfig, ClipVision
from mllm_jax.models.decoder import Decoder, DecoderConfig
from mllm_jax.models.projector import Projector, ProjectorConfig
from mllm_jax.sharding import collectives
from mllm_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A LLaVA model.

    Attributes:
      vision, projector, lm: the parts.
      image_token: id that stands for an image token in the text.
      pinpoints: (height, width) that a picture may be cut at; LLaVA reads all as one square.
    """

    vision: ClipConfig
    projector: ProjectorConfig
    lm: DecoderConfig
    image_token: int = 32000
    pinpoints: ClassVar[tuple[tuple[int, int], ...]] = ()

    @property
    def image_tokens(self) -> int:
        """Tokens of one tile in the LM."""
        return self.token_grid**2 + (self.vision.select == "full")

    @property
    def token_grid(self) -> int:
        """Rows, and columns, of the square that a tile's tokens are; 0 where they are none."""
        return self.vision.grid // self.projector.fold

    @property
    def tiles(self) -> int:
        """Places for tiles that a picture has in a batch."""
        return 1

    @property
    def largest(self) -> tuple[int, int]:
        """(height, width) of a picture with as many tokens as one can have."""
        return (self.vision.image_size,) * 2

    def readers(self, batch: Batch) -> Any:
        """bool[B, I]: which tiles each row reads, all those of each of its pictures."""
        xp = np if isinstance(batch.image_token_index, np.ndarray) else jnp
        rows, tiles = len(batch.image_token_index), len(batch.tile)
        tile = (
            batch.image_token_index // self.image_tokens
        )  # negative for text, beyond all for a newline
        at = np.arange(rows)[:, None], xp.where((tile >= 0) & (tile < tiles), tile, tiles)
        read = xp.zeros((rows, tiles + 1), bool)
        if xp is np:
            read[at] = True
        else:
            read = read.at[at].set(True)
        # A tile that shows nothing but bars has no token in the LM, but its picture is read.
        picture = xp.cumsum(batch.tile % self.tiles == 0)
        return (read[:, :tiles, None] & (picture[:, None] == picture)).any(1)

    def layout(self, size: tuple[int, int] | None = None) -> Layout:
        """How a picture of this (height, width) is read; here all are alike."""
        del size
        return Layout(1, np.arange(self.image_tokens))

    def build(self, *, rngs: nnx.Rngs) -> Llava:
        """The network."""
        return Llava(self, rngs=rngs)

    @classmethod
    def of(cls, vision: ClipConfig, lm: DecoderConfig, *, fold: int = 1, **fields) -> LlavaConfig:
        """A LLaVA of these two, with the usual two-layer projector between them."""
        projector = ProjectorConfig(in_width=vision.width, out_width=lm.width, fold=fold)
        return cls(vision=vision, projector=projector, lm=lm, **fields)

    @classmethod
    def llava_1_5_7b(cls) -> LlavaConfig:
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.vicuna_7b())

    @classmethod
    def llava_1_5_13b(cls) -> LlavaConfig:
        return cls.of(ClipConfig.vit_l_14_336(), DecoderConfig.vicuna_13b())

    @classmethod
    def embedded(cls) -> LlavaConfig:
        vision, lm = ClipConfig.vit_b_16(), DecoderConfig.smollm2_135m()
        return cls.of(vision, lm, fold=2, image_token=49152)

    @classmethod
    def tiny(cls) -> LlavaConfig:
        return cls.of(ClipConfig.tiny(), DecoderConfig.tiny(), fold=2, image_token=95)


class Llava(nnx.Module):
    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = ClipVision(config.vision, rngs=rngs)
        self.projector = Projector(config.projector, rngs=rngs)
        self.lm = Decoder(config.lm, rngs=rngs)

    def token_maps(self, batch: Batch) -> dict[str, tokens.TokenMap]:
        """The token map of each module: vision [I, P], projector [I, P], LM [B, T]."""
        vision = self.config.vision
        grid, folded = (vision.grid,) * 2, (self.config.token_grid,) * 2
        full = vision.select == "full"
        maps = {
            "vision": tokens.TokenMap.grid(batch.tile, grid, True, batch.is_real_tile),
            "projector": tokens.TokenMap.grid(batch.tile, folded, full, batch.is_real_tile),
        }
        return self.with_readers(batch, maps) | dict.fromkeys(("lm", "logits"), batch.tokens)

    def with_readers(
        self, batch: Batch, maps: dict[str, tokens.TokenMap]
    ) -> dict[str, tokens.TokenMap]:
        """Maps of tiles that know which rows of the batch read them."""
        readers = self.config.readers(batch)
        return {name: dataclasses.replace(map_, readers=readers) for name, map_ in maps.items()}

    def unshared(self, batch: Batch) -> Batch:
        """The batch with tiles of its own for each row; itself where rows share none.

        A batch that is traced stays as it is: how many tiles there will be must be known.
        """
        readers = self.config.readers(batch)
        if isinstance(readers, jax.core.Tracer):
            return batch
        readers = np.asarray(readers)
        if (readers.sum(0) <= 1).all():
            return batch
        rows, size = len(readers), int(np.max(batch.tile)) + 1  # places of tiles, for each row
        first = readers.argmax(1) // size * size  # the tiles of a row stand side by side
        at = (first[:, None] + np.arange(size)).reshape(-1)
        real = np.asarray(batch.is_real_tile)[at] & np.repeat(readers.any(1), size)

        def own(array, fill=0):
            if array is None or not len(array):
                return array
            array = np.asarray(array)[at]
            return np.where(real.reshape(-1, *(1,) * (array.ndim - 1)), array, fill)

        tokens_ = size * self.config.image_tokens  # of a row
        image_token_index = np.asarray(batch.image_token_index)
        moved = image_token_index + (np.arange(rows) - first // size)[:, None] * tokens_
        newline = image_token_index == len(batch.tile) * self.config.image_tokens
        image_token_index = np.where(
            newline, rows * tokens_, np.where(image_token_index < 0, -1, moved)
        )
        return batch.replace(
            image_token_index=image_token_index.astype(np.int32),
            pixels=own(batch.pixels),
            tile=np.asarray(batch.tile)[at],
            is_real_tile=real,
            features=own(batch.features),
            qformer_ids=own(batch.qformer_ids),
            qformer_kind=own(batch.qformer_kind, tokens.CODE["pad"]),
        )

    def features(self, batch: Batch, taps) -> Float[Array, "I P E"]:
        """What the vision tower gives to the projector."""
        dtype = self.vision.cls.dtype
        if batch.features is not None:
            return batch.features.astype(dtype)
        return self.vision(batch.pixels.astype(dtype), taps.module("vision"))

    def images(self, batch: Batch, taps) -> Float[Array, "n D"]:
        """The image tokens of all tiles, one after the other: what `image_token_index` counts."""
        features = self.features(batch, taps)
        images = self.projector(features, taps.module("projector", lens=self.lm.lens))
        return images.reshape(-1, images.shape[-1])

    def embed(self, batch: Batch, taps) -> Float[Array, "B T D"]:
        """Word embeddings with the image tokens merged in place."""
        words = self.lm.embeddings(batch.ids)
        tap = taps.module("lm", lens=self.lm.lens)
        if not len(batch.is_real_tile):  # text alone: neither vision nor projector are run
            return tap(sites.lm.embed, words)
        images = self.images(batch, taps).astype(words.dtype)
        at = batch.image_token_index
        images = collectives.take_image_tokens(images, jnp.maximum(at, 0), len(batch.is_real_tile))
        merged = jnp.where((at >= 0)[..., None], images, words)
        return tap(sites.lm.embed, merged)

    def __call__(
        self, batch: Batch, taps, past: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final normed states of every token, and the cache."""
        x = self.embed(batch, taps)
        return self.read(x, batch.position, batch.valid, taps, past, batch.segment)

    def read(self, x, position, valid, taps, past=None, segment=None):
        """The language model on embeddings that are merged already."""
        tap = taps.module("lm", lens=self.lm.lens)
        return self.lm(x, position, valid, tap, past, segment)

    def logits(self, x: Float[Array, "B T D"], taps) -> Float[Array, "B T V"]:
        """float32 logits of normed states."""
        return taps.module("logits")(sites.logits, self.lm.logits(x))
