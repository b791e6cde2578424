"""Image processors of checkpoints: those of transformers, that nothing strange runs in."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from mllm_jax.data import pictures, prompts

# A picture's shorter side is scaled to as many sides of a tile, at most.
SCALED = 16


def read(directory: pathlib.Path):
    """The checkpoint's image processor, PIL backend: pixel values do not depend on torch.

    Code that comes with a checkpoint is never run.
    """
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if path.exists():
            try:
                return AutoImageProcessor.from_pretrained(
                    directory, backend="pil", trust_remote_code=False
                )
            except Exception as error:  # whatever a wrong setting leads to
                raise ValueError(
                    f"{path}: no image processor of transformers can be made of it: "
                    f"{prompts.first_line(error)}"
                ) from error
    raise FileNotFoundError(f"{directory} has no preprocessor_config.json to prepare pictures with")


def check_size(images, side: int, directory) -> None:
    """Raises where an image processor makes pictures of another size than the tower reads."""
    size, crop = (_sides(getattr(images, name, None)) for name in ("size", "crop_size"))
    made = crop if getattr(images, "do_center_crop", False) else size
    made = [made[name] for name in ("height", "width") if name in made]
    path = f"{directory}/preprocessor_config.json"
    if any(number != side for number in made):
        raise ValueError(
            f"{path}: pictures are made {' x '.join(map(str, made))}, the vision tower reads "
            f"{side} x {side} (image_size in config.json): make them the same"
        )
    largest = max(size.values(), default=0)
    if largest > SCALED * side:
        raise ValueError(
            f"{path}: size {largest} is more than {SCALED} times the {side} that the vision tower "
            "reads: set the size that the model was trained with"
        )


def _sides(size: Any) -> dict[str, int]:
    """The numbers of a size of transformers."""
    names = ("height", "width", "shortest_edge", "longest_edge")
    found = {name: getattr(size, name, None) for name in names}
    return {name: number for name, number in found.items() if isinstance(number, (int, float))}


def squared(image, mean: Sequence[float]):
    """A picture in the middle of a square of the mean colour (Liu et al. 2023, LLaVA-1.5).

    Args:
      image: of PIL, in RGB. mean: of each channel, 0 to 1.
    """
    import PIL.Image

    side = max(image.size)
    if side**2 > pictures.MAX_PIXELS:
        raise ValueError(
            f"a picture of {image.width} x {image.height} (width x height) makes a square of more "
            f"than {pictures.MAX_PIXELS:,} pixels: make it smaller"
        )
    square = PIL.Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
