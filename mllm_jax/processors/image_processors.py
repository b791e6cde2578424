"""Image processors of checkpoints: those of transformers, that nothing strange runs in."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.processors import pictures, tokenizers

# A picture's shorter side is scaled to as many sides of a tile, at most.
MAX_UPSCALE = 16


def read(directory: pathlib.Path):
    """The checkpoint's image processor, PIL backend: pixel values do not depend on torch.

    Code that comes with a checkpoint is never run.
    """
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if path.exists():
            files.regular(path)
            return construct(
                path,
                lambda: AutoImageProcessor.from_pretrained(
                    directory, backend="pil", trust_remote_code=False
                ),
            )
    raise FileNotFoundError(f"{directory} has no preprocessor_config.json to prepare pictures with")


def construct(path: pathlib.Path, make: Callable[[], Any]) -> Any:
    """An image processor of transformers; whatever its settings lead to is a ValueError."""
    try:
        return make()
    except Exception as error:
        reason = tokenizers.first_line(error)
        message = f"{files.line(path, 200)}: no image processor of transformers: {reason}"
        raise ValueError(message) from error


def check_size(images, side: int, directory) -> None:
    """Raises where an image processor makes pictures of another size than the tower reads."""
    size, crop = (_sides(getattr(images, name, None)) for name in ("size", "crop_size"))
    shape = crop if getattr(images, "do_center_crop", False) else size
    shape = [shape[name] for name in ("height", "width") if name in shape]
    path = f"{files.line(directory, 150)}/preprocessor_config.json"
    if any(number != side for number in shape):
        raise ValueError(
            f"{path}: pictures are made {' x '.join(map(str, shape))}, the vision tower reads "
            f"{side} x {side} (image_size in config.json): make them the same"
        )
    largest = max(size.values(), default=0)
    if largest > MAX_UPSCALE * side:
        raise ValueError(
            f"{path}: size {largest} is more than {MAX_UPSCALE} times the {side} that the vision "
            "tower reads: set the size that the model was trained with"
        )


def preprocess(processor, images: list, side: int, directory) -> np.ndarray:
    """float[n, ..., 3, side, side]: what an image processor makes of pictures.

    Args:
      processor: of transformers. images: of PIL, in RGB.
      side: of the squares that the vision tower reads. directory: of the checkpoint, for errors.

    Raises:
      ValueError: it cannot, or makes something that the tower does not read.
    """
    path = f"{files.line(directory, 150)}/preprocessor_config.json"
    try:
        values = np.asarray(processor(images, return_tensors="np")["pixel_values"])
    except Exception as error:  # whatever a wrong setting leads to
        reason = tokenizers.first_line(error)
        raise ValueError(f"{path}: pictures cannot be prepared like this: {reason}") from error
    if values.shape[-2:] != (side, side):
        raise ValueError(
            f"{path}: the image processor makes pictures of {values.shape[-2:]}, the vision tower "
            f"reads {(side, side)}: set size and crop_size"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: pixels are not finite: look at image_mean and image_std")
    return values


def _sides(size: Any) -> dict[str, int]:
    """The numbers of a size of transformers."""
    names = ("height", "width", "shortest_edge", "longest_edge")
    found = {name: getattr(size, name, None) for name in names}
    return {name: number for name, number in found.items() if isinstance(number, (int, float))}


def pad_to_square(image, mean: Sequence[float]):
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
