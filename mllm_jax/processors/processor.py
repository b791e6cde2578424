"""The processor, which makes a batch of pictures and prompts with the kind of every token."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import PIL.Image

from mllm_jax.arguments import require_whole
from mllm_jax.batch import Batch, Layout
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors import (
    attention_order,
    image_processors,
    packing,
    row_pictures,
    tokenizers,
)
from mllm_jax.processors import prompts as prompts_
from mllm_jax.processors import rows as rows_
from mllm_jax.processors.prompt_encoder import PromptEncoder
from mllm_jax.processors.prompts import Chat
from mllm_jax.processors.rows import Picture, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Processor(PromptEncoder):
    """The tokenizer, the chat template and the image processor of a checkpoint.

    Args:
      tokenizer: A fast tokenizer of transformers (it must give character offsets).
      pictures: A function that makes the image processor of transformers (PIL backend); it is
        called when the image processor is first needed.
      config: The model's config: the id of the image token, and the layout of pictures.
      directory: The checkpoint's directory, for errors.
      image_aspect_ratio: The option of that name in the original LLaVA. "square" leaves a picture
        to the image processor, which crops it; "pad" first pads it to a square with the mean
        colour, as in the training of LLaVA-1.5; "anyres" is LLaVA-NeXT's. None means "anyres" if
        the config has pinpoints, "keep" if pictures keep their shape, else "square".
      stop_ids: Ids that end an answer, besides the tokenizer's end of sequence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pictures: Callable[[], Any],
        config: MultimodalConfig,
        directory: str | os.PathLike | None = None,
        *,
        image_aspect_ratio: str | None = None,
        stop_ids: Sequence[int] = (),
    ):
        known = ("anyres",) if config.pinpoints else ("square", "pad")
        known = ("keep",) if config.tile_side is None else known
        image_aspect_ratio = image_aspect_ratio or known[0]
        if image_aspect_ratio not in known:
            raise ValueError(
                f"image_aspect_ratio={image_aspect_ratio!r}: this model has {' and '.join(known)}"
            )
        super().__init__(tokenizer, config, directory, stop_ids=stop_ids)
        self.image_aspect_ratio = image_aspect_ratio
        self._make_image_processor = pictures

    @classmethod
    def from_directory(
        cls,
        directory: str | os.PathLike,
        config: MultimodalConfig,
        *,
        pictures: Callable[[], Any] | None = None,
        image_aspect_ratio: str | None = None,
        **options: Any,
    ) -> Processor:
        """Return the processor of a local checkpoint directory.

        Args:
          directory: The checkpoint's directory.
          config: The model's config.
          pictures: A function that makes the image processor; by default that of the directory.
          image_aspect_ratio: See the class.
          **options: Further arguments of the class.
        """
        directory = pathlib.Path(directory)
        tokenizer = tokenizers.read_tokenizer(directory)
        reserved = 0 <= config.image_token < config.lm.vocab
        if cls.image_text and cls.image_text not in tokenizer.get_vocab() and not reserved:
            # The original LLaVA code has no chat template.
            tokenizer.add_special_tokens({"additional_special_tokens": [cls.image_text]})
            added = cast(int, tokenizer.convert_tokens_to_ids(cls.image_text))
            config = dataclasses.replace(config, image_token=added)
        pictures = pictures or functools.partial(image_processors.read, directory)
        options["image_aspect_ratio"] = image_aspect_ratio
        options["stop_ids"] = tokenizers.read_stop_ids(directory)
        return cls(tokenizer, pictures, config, directory, **options)

    @functools.cached_property
    def image_processor(self) -> Any:
        """The image processor of transformers, checked against the config.

        Raises:
          ValueError: Its pictures have another size than the model reads.
        """
        image_processor = self._make_image_processor()
        self._check_image_processor(image_processor)
        return image_processor

    def _check_image_processor(self, image_processor: Any) -> None:
        """Raise ValueError if an image processor produces other sizes than the model reads."""
        pinpoints = getattr(image_processor, "image_grid_pinpoints", None) or ()
        pinpoints = tuple(map(tuple, pinpoints))
        if pinpoints != self.config.pinpoints:
            raise ValueError(
                f"{self.directory}: the image processor cuts pictures at {pinpoints}, the model at "
                f"{self.config.pinpoints}; image_grid_pinpoints must be equal in both configs"
            )
        image_processors.check_size(image_processor, self._tile_side, self.directory)

    @property
    def _tile_side(self) -> int:
        """The side of a tile in pixels; 0 for a model that reads no tiles."""
        return self.config.tile_side or 0

    def picture_settings(self) -> list[Any]:
        """Return the settings that pixels depend on, for the fingerprints of stores."""
        image_processor = self.image_processor
        has_settings = hasattr(image_processor, "to_dict")
        settings = image_processor.to_dict() if has_settings else image_processor
        return [self.image_aspect_ratio, self.config.pinpoints, settings]

    def _fingerprint_(self) -> list[Any]:
        """Return the settings that batches depend on, besides pictures and text."""
        contents = map(
            tokenizers.tokenizer_content,
            [self.tokenizer, getattr(self, "qformer_tokenizer", None)],
        )
        return [self.config, self.picture_settings(), self.stop_ids, *contents]

    def __call__(
        self,
        images: Sequence[Any] | None,
        prompts: Sequence[str | Chat],
        *,
        answers: Sequence[str] | None = None,
        features: np.ndarray | None = None,
        sizes: Sequence[tuple[int, int] | None] | None = None,
        rows: int | None = None,
        length: int | None = None,
        left: bool = False,
    ) -> Batch:
        """Return a batch of one prompt per row.

        Args:
          images: One picture or a list of pictures for each row, or None for text. A picture is a
            path, bytes, an array or a PIL picture, see `pictures.read`. One that is given several
            times, such as `[picture] * 4` with four prompts, is encoded once.
          prompts: Strings or chats. A string that contains `<image>` is used verbatim; any other is
            inserted into the chat template, pictures first. In a chat of several turns, see
            `prompts`, the user's texts are of kind question, everything else is of kind system; its
            pictures are those of `images`, or else those in its parts.
          answers: Plain texts, read after the prompts, with an end of turn; their tokens are of
            kind answer. The text of a special token is refused.
          features: float[B, P, E], vision features of one picture per row, padded to all its tiles,
            in place of images.
          sizes: (height, width) of those pictures, if their layout depends on it.
          rows: The number of rows to which empty rows pad the batch.
          length: The length to which rows are padded, instead of the nearest of LENGTHS.
          left: Whether to pad on the left.

        Raises:
          ValueError: An argument is wrong; the message states the row.
        """
        prompts = prompts_.parse_prompts(prompts)
        if not prompts and not rows:
            raise ValueError("prompts is empty: give one or more")
        images = row_pictures.images_or_those_of_chats(images, prompts)
        pictures = self._read_pictures(images, features, sizes, len(prompts))
        if answers is not None:
            answers = prompts_.as_strings(answers, "answers")
            if len(answers) != len(prompts):
                raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
        encoded = [
            self._encode_row(prompt, row_images, f"prompts, row {number}")
            for number, (prompt, row_images) in enumerate(zip(prompts, pictures, strict=True))
        ]
        for number, (row, answer) in enumerate(zip(encoded, answers or (), strict=False)):
            self._append_answer(row, answer, f"answers, row {number}")
        return self._assemble(encoded, pictures, features, rows, length, left)

    def pack(
        self,
        images: Sequence[Any] | None,
        turns: Sequence[Sequence[tuple[str, str]]],
        *,
        features: np.ndarray | None = None,
        sizes: Sequence[tuple[int, int] | None] | None = None,
        rows: int | None = None,
        length: int | None = None,
    ) -> Batch:
        """Return a batch of several questions about one picture per row, which is encoded once.

        Each question with its answer is a separate segment. It attends to the picture but not to
        other questions, and has the positions that it would have alone.

        Args:
          images: One picture per row.
          turns: (question, answer) pairs of each row.
          features: As in a call.
          sizes: As in a call.
          rows: As in a call.
          length: As in a call.
        """
        parsed = packing.parse_turns(turns)
        if self.config.attends_forward == "prompt":
            raise ValueError(
                "pack: each picture of this model attends to the question after it, so questions "
                "cannot share one; use processor(images, prompts) with a row for each"
            )
        pictures = self._read_pictures(images, features, sizes, len(parsed))
        packed = [
            self._pack_row(pairs, row_images, f"turns, row {number}")
            for number, (pairs, row_images) in enumerate(zip(parsed, pictures, strict=True))
        ]
        if self.reencode_per_question:
            pictures = [
                row_images * len(pairs) for row_images, pairs in zip(pictures, parsed, strict=True)
            ]
        return self._assemble(packed, pictures, features, rows, length, False)

    def unpack(self, batch: Batch) -> Batch:
        """Return a packed batch with one row per question, for `generate` and `score`.

        The pictures are unchanged, and read by several rows. Rows without a question are left out.

        Args:
          batch: A batch that `pack` made.

        Raises:
          ValueError: The batch is not packed.
        """
        of_row = int(np.max(batch.tile, initial=0)) + 1
        tiles = self.config.tiles if self.reencode_per_question else of_row
        return packing.unpack(batch, tiles, self._padding_id)

    def _assemble(
        self,
        encoded: list[Row],
        pictures: list[list[Picture]],
        features: np.ndarray | None,
        rows: int | None,
        length: int | None,
        left: bool,
    ) -> Batch:
        """Return the batch of encoded rows and their pictures; see a call for the arguments."""
        given = len(encoded)
        rows = given if rows is None else require_whole("rows", rows)
        length = None if length is None else require_whole("length", length)
        if rows < max(given, 1):
            raise ValueError(
                f"rows={rows} for {given} prompts: a batch needs one row per prompt, at least one"
            )
        missing = rows - given
        encoded, pictures = encoded + [Row()] * missing, pictures + [[]] * missing
        # Pad the pictures of a row and the tiles of a picture, for few shapes.
        of_row, count = rows_.assign_image_slots(pictures, encoded)
        tiles = self._slot_tiles(pictures, features)
        tile_tokens = self._tile_tokens(pictures, features)
        T = self._padded_length(encoded, tiles * tile_tokens, length)
        slots = rows_.ImageSlots(of_row, count, tiles, tile_tokens)
        fields = rows_.token_arrays(encoded, T, slots, padding_id=self._padding_id, left=left)
        in_slot: list[list[Picture]] = [[] for _ in range(count)]
        for slot, row_images in zip(of_row, pictures, strict=True):
            in_slot[slot] = in_slot[slot] or row_images
        pixels, real = self._pixels(in_slot, tiles, features is None)
        if features is not None:
            features = rows_.place_features(features, pictures, max(map(len, pictures)))
            features = features.reshape(len(real), -1, features.shape[-1])
        uses_axes = self.config.lm.rope_sections is not None
        return Batch(
            **fields,
            pixels=pixels,
            tile=np.tile(np.arange(tiles, dtype=np.int16), count),
            is_real_tile=real,
            features=features,
            labels=rows_.answer_positions(fields["tokens"].kind),
            rotary_position=(
                attention_order.rotary_positions(encoded, T, left) if uses_axes else None
            ),
            block=attention_order.blocks(encoded, T, left, self.config.attends_forward),
            grid=self._grids(in_slot, tiles),
            processor=self,
            shares_tiles=count < len(encoded),
        )

    def _padded_length(self, encoded: list[Row], image_places: int, length: int | None) -> int:
        """Return T, the length to which rows are padded.

        Args:
          encoded: The rows.
          image_places: The padded number of image tokens of each row.
          length: The length that the user requests.
        """
        del image_places
        longest = max(map(len, encoded))
        T = rows_.round_up_length(longest) if length is None else length
        if longest > T:
            raise ValueError(f"a row has {longest} tokens, more than length={T}")
        return T

    def _slot_tiles(self, pictures: list[list[Picture]], features: np.ndarray | None) -> int:
        """Return the padded number of tiles of the pictures of each row."""
        del features
        return self.config.tiles * max((len(row) for row in pictures), default=0)

    def _tile_tokens(self, pictures: list[list[Picture]], features: np.ndarray | None) -> int:
        """Return the padded number of tokens of each tile."""
        del pictures, features
        return self.config.image_tokens

    def feature_places(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the padded number P of vision features of pictures of these (height, width)."""
        del sizes
        return self.config.tiles * self.config.vision.feature_tokens

    def _check_features(
        self, features: np.ndarray, sizes: Sequence[tuple[int, int] | None]
    ) -> None:
        """Raise ValueError unless features are [B, P, E] with the padded length P of pictures."""
        places = self.feature_places([(row, column) for row, column in filter(None, sizes)])
        if np.ndim(features) != 3 or not self._are_places(features.shape[1], places):
            raise ValueError(
                f"features has the shape {np.shape(features)}: it must be [rows, {places}, width], "
                f"with {places} the padded number of features of a picture"
            )

    def _are_places(self, given: int, needed: int) -> bool:
        """Return whether features padded to `given` fit pictures that need `needed`."""
        return given == needed

    def tile_picture(self, batch: Batch, tile: int) -> PIL.Image.Image:
        """Return a tile of a batch as a picture, as the vision tower reads it."""
        made = self.image_processor
        mean, std = (
            np.asarray(getattr(made, f"image_{n}", v)) for n, v in (("mean", 0), ("std", 1))
        )
        pixels = self._tile_pixels(batch, tile) * std + mean
        return PIL.Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))

    def _tile_pixels(self, batch: Batch, tile: int) -> np.ndarray:
        """Return the normalised pixels of a tile, [row, column, 3]."""
        return np.asarray(batch.pixels[tile])

    def _grids(self, pictures: list[list[Picture]], tiles: int) -> np.ndarray | None:
        """Return the rows and columns of patches of each picture, see `Batch.grid`."""
        del pictures, tiles
        return None

    def layout(self, size: tuple[int, int] | None) -> Layout:
        """Return the layout of a picture of this (height, width)."""
        return self.config.layout(size)

    def layouts(self, sizes: Sequence[tuple[int, int] | None]) -> list[Layout]:
        """Return the layouts of the pictures of a row, of these (height, width)."""
        return [self.layout(size) for size in sizes]

    def _read_pictures(
        self,
        images: Any,
        features: np.ndarray | None,
        sizes: Sequence[tuple[int, int] | None] | None,
        rows: int,
    ) -> list[list[Picture]]:
        """Return the pictures of each row; given features, pictures without pixels."""
        if features is not None:
            if images is not None:
                raise ValueError("give images or features, not both")
            if len(features) != rows:
                raise ValueError(f"features of {len(features)} pictures for {rows} rows")
            sizes = [None] * rows if sizes is None else sizes
            pictures = [[Picture(None, self.layout(size))] for size in sizes]
            self._check_features(features, sizes)
        elif sizes is not None:
            raise ValueError("sizes= is only for features=: pictures have their own sizes")
        else:
            opened = row_pictures.open_rows([[]] * rows if images is None else images)
            pictures = []
            for row in opened:
                layouts = self.layouts([p.size[::-1] for p in row])  # PIL gives the width first
                pictures.append([Picture(*pair) for pair in zip(row, layouts, strict=True)])
        if len(pictures) != rows:
            raise ValueError(f"{len(pictures)} rows of pictures for {rows} prompts")
        return pictures

    def _pixels(
        self, pictures: list[list[Picture]], tiles: int, read: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels [I, row, column, 3] with `tiles` per slot, and which of the I are real.

        Args:
          pictures: The pictures of each slot.
          tiles: The number of tiles of a slot.
          read: Whether the pixels are needed; else they are empty.
        """
        size, real = self._tile_side if read else 0, self._real_tiles(pictures, tiles)
        pixels = np.zeros((len(real), size, size, 3), np.float32)
        flat = [picture for row in pictures for picture in row]
        if read and flat:
            pixels[real] = np.moveaxis(np.concatenate(self._tiles(flat)), 1, -1)
        return pixels, real

    def _real_tiles(self, pictures: list[list[Picture]], tiles: int) -> np.ndarray:
        """Return which tiles of all slots show a part of a picture, bool[I]."""
        is_real = np.zeros((len(pictures), tiles), bool)
        for slot, row in zip(is_real, pictures, strict=True):
            layouts = [picture.layout for picture in row]
            for first, layout in zip(self.first_tiles(layouts), layouts, strict=True):
                slot[first : first + layout.tiles] = True
        return is_real.reshape(-1)

    def _tiles(self, pictures: list[Picture]) -> list[np.ndarray]:
        """Return the tiles of each picture, float32[tiles, 3, row, column]."""
        values = self._preprocess([picture.image for picture in pictures])
        return [v[: picture.layout.tiles] for v, picture in zip(values, pictures, strict=True)]

    def _preprocess(self, images: list[Any]) -> np.ndarray:
        """Return float32[n, tiles, 3, row, column], normalised by the image processor."""
        if self.image_aspect_ratio == "pad":
            mean = self.image_processor.image_mean
            images = [image_processors.pad_to_square(image, mean) for image in images]
        values = image_processors.preprocess(
            self.image_processor, images, self._tile_side, self.directory
        )
        return values.reshape(len(images), -1, *values.shape[-3:])
