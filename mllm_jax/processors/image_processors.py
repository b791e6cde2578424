"""Image processors of checkpoints: those of transformers; no code of a checkpoint runs."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from mllm_jax import files
from mllm_jax.processors import pictures, tokenizers

# The most sides of a tile that a picture's shorter side may be scaled to.
MAX_UPSCALE = 16


def read(directory: pathlib.Path) -> Any:
    """Return the checkpoint's image processor, PIL backend: pixel values do not depend on torch.

    Code that comes with a checkpoint is never run.

    Raises:
      FileNotFoundError: The directory has no image processor.
      ValueError: transformers has no such image processor.
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
    """Return the image processor that `make` constructs; any error becomes a ValueError."""
    try:
        return make()
    except Exception as error:
        reason = tokenizers.first_line(error)
        message = f"{files.line(path, 200)}: no image processor of transformers: {reason}"
        raise ValueError(message) from error


def check_size(processor: Any, side: int, directory: object) -> None:
    """Raise ValueError if an image processor produces sizes that the vision tower does not read.

    Args:
      processor: The image processor of transformers.
      side: The side of the squares that the vision tower reads.
      directory: The checkpoint's directory, for errors.
    """
    size, crop = (_sides(getattr(processor, name, None)) for name in ("size", "crop_size"))
    sides = crop if getattr(processor, "do_center_crop", False) else size
    shape = [sides[name] for name in ("height", "width") if name in sides]
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


def preprocess(processor: Any, images: Sequence[Any], side: int, directory: object) -> np.ndarray:
    """Return the pixels that an image processor computes for pictures.

    Args:
      processor: The image processor of transformers.
      images: Pictures of PIL, in RGB, or lists of those of each row.
      side: The side of the squares that the vision tower reads.
      directory: The checkpoint's directory, for errors.

    Returns:
      float[n, ..., 3, side, side].

    Raises:
      ValueError: It fails, or its pixels have a size that the tower does not read.
    """
    values = prepare(processor, images, directory)["pixel_values"]
    if values.shape[-2:] != (side, side):
        path = f"{files.line(directory, 150)}/preprocessor_config.json"
        raise ValueError(
            f"{path}: the image processor makes pictures of {values.shape[-2:]}, the vision tower "
            f"reads {(side, side)}: set size and crop_size"
        )
    return values


def prepare(
    processor: Any, images: Sequence[Any], directory: object, **settings: Any
) -> dict[str, np.ndarray]:
    """Return the arrays that an image processor computes for pictures, including `pixel_values`.

    Args:
      processor: The image processor of transformers.
      images: Pictures of PIL, in RGB, or lists of those of each row.
      directory: The checkpoint's directory, for errors.
      **settings: Settings of the image processor that override those of the checkpoint.

    Raises:
      ValueError: It fails, or its pixels are not finite.
    """
    path = f"{files.line(directory, 150)}/preprocessor_config.json"
    try:
        made = processor(images, return_tensors="np", **settings)
        arrays = {name: np.asarray(made[name]) for name in made}
    except Exception as error:  # a wrong setting can raise anything
        reason = tokenizers.first_line(error)
        raise ValueError(f"{path}: pictures cannot be prepared like this: {reason}") from error
    if not np.isfinite(arrays["pixel_values"]).all():
        raise ValueError(f"{path}: pixels are not finite: check image_mean and image_std")
    return arrays


def _sides(size: Any) -> dict[str, float]:
    """Return the numbers of a size of transformers by their name."""
    names = ("height", "width", "shortest_edge", "longest_edge")
    values = {name: getattr(size, name, None) for name in names}
    return {name: number for name, number in values.items() if isinstance(number, (int, float))}


def pad_to_square(image: PIL.Image.Image, mean: Sequence[float]) -> PIL.Image.Image:
    """Return a picture in the middle of a square of the mean colour (Liu et al. 2023, LLaVA-1.5).

    Args:
      image: A picture of PIL, in RGB.
      mean: The mean of each channel, 0 to 1.

    Raises:
      ValueError: The square would be too large.
    """
    side = max(image.size)
    if side**2 > pictures.MAX_PIXELS:
        raise ValueError(
            f"a picture of {image.width} x {image.height} (width x height) makes a square of more "
            f"than {pictures.MAX_PIXELS:,} pixels: scale it down"
        )
    square = PIL.Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
