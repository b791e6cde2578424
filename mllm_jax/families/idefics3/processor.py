"""The processor of Idefics3 and SmolVLM: tiles in rows, each after a marker of its position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.batch import Layout
from mllm_jax.families.idefics3 import model
from mllm_jax.families.idefics3.model import Idefics3Config
from mllm_jax.models.multimodal import require_size
from mllm_jax.processors import image_processors
from mllm_jax.processors.packed_tiles import PackedTilesProcessor
from mllm_jax.processors.rows import Picture

_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"


class Idefics3Processor(PackedTilesProcessor):
    """A processor of an Idefics3 or SmolVLM checkpoint."""

    config: Idefics3Config
    markers = (_AROUND,)  # some checkpoints write the others as words

    def layout(self, size: tuple[int, int] | None) -> Layout:
        """Return the layout of a picture of this (height, width).

        Raises:
          ValueError: The size is not known, and the layout depends on it.
        """
        size = require_size(size, "this model cuts a picture by its size")
        how, grid = self.image_processor, (0, 0)
        if how.do_image_splitting:
            longest = _longest(how.size) if how.do_resize else None
            grid = model.tile_grid(size, self.config.vision.image_size, longest)
        return self.config.layout_of_tiles(grid)

    def picture_text(self, picture: Picture) -> str:
        """Return the text of a picture: its tiles in rows, then the whole picture."""
        rows, columns = picture.layout.tile_grid
        image = self.image_text
        tiles = "".join(
            "".join(f"{_AROUND}<row_{r}_col_{c}>{image}" for c in range(1, columns + 1)) + "\n"
            for r in range(1, rows + 1)
        )
        return tiles + "\n" * bool(tiles) + f"{_AROUND}{_WHOLE}{image}{_AROUND}"

    def _check_image_processor(self, image_processor: Any) -> None:
        path, side = files.line(self.directory, 150), self.config.vision.image_size
        tile = _longest(getattr(image_processor, "max_image_size", None))
        if tile != side:
            raise ValueError(
                f"{path}/preprocessor_config.json: max_image_size cuts tiles of {tile} pixels, the "
                f"vision tower reads {side} (image_size in config.json): they must be equal"
            )
        longest = _longest(image_processor.size)
        if image_processor.do_resize and longest is None:
            raise ValueError(
                f"{path}/preprocessor_config.json: size={image_processor.size}: only "
                "longest_edge is supported"
            )

    def _tiles(self, pictures: list[Picture]) -> list[np.ndarray]:
        images = [picture.image for picture in pictures]
        side = self.config.vision.image_size
        made = image_processors.preprocess(self.image_processor, [images], side, self.directory)[0]
        ends = np.cumsum([picture.layout.tiles for picture in pictures])
        return np.split(made, ends[:-1])


def _longest(size: Any) -> Any:
    """Return the longest edge of a size of transformers, or None."""
    if isinstance(size, Mapping):
        return size.get("longest_edge")
    return getattr(size, "longest_edge", size)
