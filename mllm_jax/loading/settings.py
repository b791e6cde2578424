"""Check the small JSON files of a checkpoint before transformers reads them."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints import fields as fields_
from mllm_jax.checkpoints import schema

PICTURES = ("preprocessor_config.json", "processor_config.json")
_GENERATION = "generation_config.json"
_READ = (".jinja", ".json", ".model", ".txt")
_MAX_ENLARGEMENT = 4  # of a side before the crop, relative to the side that the tower reads
_MAX_TILES = 16  # along the longer side of a picture that is cut

_FLAG = schema.optional(schema.FLAG)
_COLOUR = schema.optional(schema.many(schema.real(-1000, 1000), 3, 3))
_SPREAD = schema.optional(schema.many(schema.real(1e-3, 1000), 3, 3))
_NAME = schema.optional(schema.NAME)
_SIZE = schema.optional(
    schema.either(schema.SIDE, schema.Kind("an object", lambda value: isinstance(value, Mapping)))
)
_FIELDS = {
    "image_processor_type": (_NAME, None),
    "feature_extractor_type": (_NAME, None),
    "processor_class": (_NAME, None),
    "do_convert_rgb": (_FLAG, None),
    "do_resize": (_FLAG, None),
    "do_center_crop": (_FLAG, None),
    "do_rescale": (_FLAG, None),
    "do_normalize": (_FLAG, None),
    "do_pad": (_FLAG, None),
    "do_pan_and_scan": (schema.only(False, None), None),
    "size": (_SIZE, None),
    "crop_size": (_SIZE, None),
    "resample": (schema.optional(schema.whole(0, 5)), None),
    "rescale_factor": (schema.optional(schema.real(1e-6, 1000)), None),
    "image_mean": (_COLOUR, None),
    "image_std": (_SPREAD, None),
    "image_grid_pinpoints": (fields_.PINPOINTS, None),
    "min_pixels": (schema.optional(schema.PLACES), None),
    "max_pixels": (schema.optional(schema.PLACES), None),
}
_EDGES = ("shortest_edge", "longest_edge", "height", "width")
_LIMITS = ("min_pixels", "max_pixels")


def check(pictures: pathlib.Path, texts: pathlib.Path, side: int | None) -> None:
    """Refuse settings of images or of generation that are damaged or do not fit the vision tower.

    Args:
      pictures: The directory with the settings of the image processor.
      texts: The directory of the tokenizer.
      side: The side of the images that the tower reads, in pixels; None if it reads any size.

    Raises:
      ValueError: A value is not supported, or images have another size than the tower reads.
      OSError: A file is not a regular file.
    """
    for directory in {pictures, texts, texts / "qformer_tokenizer"}:
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            if path.suffix in _READ and path.exists():
                files.regular(path)  # transformers would block on a pipe
    for path in (pictures / name for name in PICTURES):
        if path.exists():
            _check_pictures(path, side)
    if (path := texts / _GENERATION).exists():
        problems: list[str] = []
        schema.values(files.read_json(path), fields_.TOKEN_IDS, "", problems)
        if problems:
            raise ValueError(files.refusal(path, problems))


def _check_pictures(path: pathlib.Path, side: int | None) -> None:
    problems: list[str] = []
    fields, prefix = files.read_json(path), ""
    if path.name == PICTURES[1]:  # of a processor, with a part for the image processor
        part = schema.values(fields, {"image_processor": (schema.PART, None)}, "", problems)
        fields, prefix = part["image_processor"] or {}, "image_processor."
    found = schema.values(fields, _FIELDS, prefix, problems)
    for name in fields:
        near = difflib.get_close_matches(name[:100], _FIELDS, n=1, cutoff=0.85)
        if near and name not in _FIELDS:
            named = files.line(name, 60)
            problems.append(f"unknown field {prefix}{named} (nearest: {near[0]})")
    sizes = {
        name: _size(found[name], f"{prefix}{name}", side, problems)
        for name in ("size", "crop_size")
    }
    cut = sizes["crop_size"] if found["do_center_crop"] is not False else {}
    final = cut or sizes["size"]
    edges = ("height", "width") if side is not None else ()
    wrong = [final[edge] for edge in edges if final.get(edge, side) != side]
    if wrong:
        problems.append(f"makes pictures of {wrong[0]} pixels, but the vision tower reads {side}")
    if problems:
        raise ValueError(files.refusal(path, problems))


def _size(value: Any, name: str, side: int | None, problems: list[str]) -> dict[str, int]:
    """Return the edges of a size, which may be a single number."""
    if value is None:
        return {}
    if isinstance(value, int):
        value = {"height": value, "width": value} if "crop" in name else {"shortest_edge": value}
    # Without a side, the edges are numbers of pixels of a whole picture.
    kind = schema.PLACES if side is None else schema.whole(1, _MAX_ENLARGEMENT * side)
    edges = dict.fromkeys((*_EDGES, *_LIMITS), (kind, None))
    if side is not None:
        edges["longest_edge"] = schema.whole(1, _MAX_TILES * side), None
    found = schema.read(value, edges, (), f"{name}.", problems)
    return {edge: n for edge, n in found.items() if n is not None}
