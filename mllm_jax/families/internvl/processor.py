"""The processor of InternVL."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_jax.families.internvl.model import InternVlConfig
from mllm_jax.processors import image_processors
from mllm_jax.processors.packed_tiles import PackedTilesProcessor
from mllm_jax.processors.rows import Picture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class InternVlProcessor(PackedTilesProcessor):
    """A processor of pictures that are cut into tiles by their shape.

    Args:
      tokenizer: As in `Processor`.
      pictures: As in `Processor`; as in transformers, the image processor cuts pictures regardless
        of its settings.
      config: As in `Processor`.
      directory: As in `Processor`.
      **options: Further arguments of `Processor`.
    """

    config: InternVlConfig
    image_text = "<IMG_CONTEXT>"
    placeholder = "<IMG_CONTEXT>"
    written_placeholder = "<IMG_CONTEXT>"
    markers = "<img>", "</img>"
    video_text = "<video>"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pictures: Callable[[], Any],
        config: InternVlConfig,
        directory: str | os.PathLike | None = None,
        **options: Any,
    ):
        def cutting() -> Any:
            image_processor = pictures()
            image_processor.crop_to_patches = True
            return image_processor

        super().__init__(tokenizer, cutting, config, directory, **options)

    def picture_text(self, picture: Picture) -> str:
        """Return the text that represents a picture in the prompt."""
        del picture
        return f"<img>{self.image_text}</img>"

    def _check_image_processor(self, image_processor: Any) -> None:
        super()._check_image_processor(image_processor)
        theirs = image_processor.min_patches, image_processor.max_patches
        if theirs != (self.config.min_tiles, self.config.max_tiles):
            low, high = theirs
            raise ValueError(
                f"{self.directory}: the image processor cuts a picture into {low} to {high} tiles, "
                f"the model into {self.config.min_tiles} to {self.config.max_tiles}: put "
                f"min_dynamic_patch={low} and max_dynamic_patch={high} in config.json"
            )

    def _tiles(self, pictures: list[Picture]) -> list[np.ndarray]:
        images: list[Any] = [picture.image for picture in pictures]
        values = image_processors.preprocess(
            self.image_processor, images, self._tile_side, self.directory
        )
        ends = np.cumsum([picture.layout.tiles for picture in pictures])
        return np.split(values, ends[:-1])
