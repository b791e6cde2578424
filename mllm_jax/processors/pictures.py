"""Read pictures as a viewer shows them: all pictures are opened by one function.

    pictures.read("scan.png")        # also bytes, an open file, an array, a picture of PIL

The picture is rotated by its EXIF orientation, composed on white if it is transparent, and
converted to 8 bits per channel. The first frame of an animation, or page of a file, is read. Colour
profiles are not applied.
"""

from __future__ import annotations

import io
import os
import stat
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms

from mllm_jax import files

# The formats that are opened, by Pillow's names; JPEG includes MPO. HEIF is available once
# pillow_heif.register_heif_opener() was called. EPS and PDF are not: they would start a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
EXTENSIONS = {  # of picture files, in lower case
    ".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif",
}  # fmt: skip
MAX_PIXELS = 2**26  # of a picture, 8192 x 8192; a few kilobytes can decode to gigabytes
MAX_RATIO = 500  # of a picture's sides: image processors scale the shorter one up to a tile
MAX_BYTES = 300 * 2**20  # of a file
STRIP = 512  # the number of rows that are converted at one time
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # file brands
OTHER_FORMATS = (  # the first bytes of files that are mistaken for pictures
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer, not yet pulled"),
)
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF


def read(picture: Any, name: str = "the picture") -> PIL.Image.Image:
    """Return a picture in RGB, 8 bits per channel, as a viewer shows it.

    Values of more than 8 bits are scaled to 8: 16 bits by 1/257. Mode I has 16 bits if its file
      says
    so, else 8 bits if no value is above 255, and 16 bits otherwise. Mode F ranges from 0 to 1 if no
    value is above 1, else from 0 to 255.

    Args:
      picture: A path; the bytes of a file, or the file, opened in binary mode; an array (of NumPy,
        JAX, torch) [row, column], or [row, column, channels] with 1, 3 or 4 channels, the fourth
        alpha: uint8, uint16, bool, or float from 0 to 1; or a picture of PIL, opened or not yet.
      name: The picture's name in errors, if it has no path.

    Raises:
      ValueError: It cannot be read, or its values are ambiguous; one line with its path or name.
    """
    if isinstance(picture, (str, os.PathLike)):
        name = f"the picture {files.name(picture)}"
    try:
        return _to_rgb(_open(picture))
    except Exception as error:  # a decoder can raise anything for damaged bytes
        raise ValueError(f"cannot read {name}: {files.reason(error)}") from error


def from_array(values: np.ndarray) -> PIL.Image.Image:
    """Return an array [row, column] or [row, column, channels] as a picture of PIL; see `read`."""
    shape = " x ".join(map(str, values.shape))
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        raise ValueError(
            f"its array of {shape} has its channels first: np.moveaxis(picture, 0, -1) moves them"
        )
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (1, 3, 4)):
        raise ValueError(
            f"its array of shape ({shape}) is not [row, column] or [row, column, 1, 3 or 4]"
        )
    _check_size(*values.shape[1::-1])
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return PIL.Image.fromarray(np.ascontiguousarray(_to_uint8(values)))


def _open(picture: Any) -> PIL.Image.Image:
    """Return a picture of PIL whose size is checked; its pixels may not be decoded yet."""
    if isinstance(picture, PIL.Image.Image):
        if picture.format == "EPS":
            raise ValueError("it is PostScript, which would start a program: save it as PNG")
        _check_size(*picture.size)
        return picture
    if isinstance(picture, (str, os.PathLike)):
        return _read_header(files.read_bytes(picture, MAX_BYTES))
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return _read_header(bytes(picture))
    if hasattr(picture, "read"):
        return _read_header(_read_file(picture))
    if hasattr(picture, "__array__"):
        return from_array(np.asarray(picture))
    raise ValueError(
        f"{type(picture).__name__} is not a picture: give a path, bytes, an array or a PIL picture"
    )


def _read_file(file: Any) -> bytes:
    """Return all bytes of an open file, from its beginning if it is seekable."""
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (AttributeError, OSError):  # it is in memory
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise ValueError("the open file is a pipe or a device: read it, and give its bytes")
    if getattr(file, "seekable", lambda: False)():
        file.seek(0)
    content = file.read(MAX_BYTES + 1)
    if not isinstance(content, bytes):
        raise ValueError("the file is open in text mode: open it in mode 'rb'")
    if len(content) > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES:,} bytes")
    return content


def _read_header(content: bytes) -> PIL.Image.Image:
    """Return the picture of a file's bytes: its header is read, its pixels are not."""
    PIL.Image.init()
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]
    try:
        picture = PIL.Image.open(io.BytesIO(content), formats=formats)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(_explain_unreadable(content)) from error
    _check_size(*picture.size)
    return picture


def _explain_unreadable(content: bytes) -> str:
    """Return why bytes cannot be opened as a picture."""
    if not content:
        return "it is empty"
    if content[4:8] == b"ftyp" and content[8:12] in HEIC:
        return (
            "HEIC is not read: convert it to JPEG (heif-convert a.heic a.jpg), or install "
            "pillow-heif and call pillow_heif.register_heif_opener()"
        )
    for start, what in OTHER_FORMATS:
        if content.lstrip()[: len(start)].lower() == start.lower():
            return f"it is {what}: save it as PNG or JPEG"
    known = ", ".join(name for name in FORMATS if name in PIL.Image.OPEN)
    return f"it is damaged, or in an unsupported format ({known} are read)"


def _check_size(width: int, height: int) -> None:
    """Raise ValueError, before anything is decoded, for a picture of no pixels or too many."""
    size = f"{width} x {height} (width x height)"
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels: {size}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it is of {size}, more than {MAX_PIXELS:,} pixels: make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"it is of {size}, one side over {MAX_RATIO} times the other: crop it")


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return the picture in RGB, decoded, rotated and composed on white."""
    raw = _raw_mode(picture)
    _load(picture)
    turn = TRANSPOSES.get(_orientation(picture) or 1)
    if picture.mode.startswith(("I", "F")):
        shown = _to_8_bit_grey(picture).convert("RGB")
    elif picture.mode == "LAB":
        shown = _lab_to_rgb(picture)
    elif _is_transparent(picture):
        shown = _on_white(_with_true_key(picture, raw))
    else:
        shown = picture.convert("RGB")
    return shown if turn is None else shown.transpose(turn)


def _lab_to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return a picture of mode LAB in RGB."""
    lab, srgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
    exact = PIL.ImageCms.Flags.NOOPTIMIZE  # else dark colours are off by 3
    rgb = PIL.ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB", flags=exact)
    assert rgb is not None  # it is None only for changes in place
    return rgb


def _load(picture: PIL.Image.Image) -> None:
    """Decode the pixels.

    Pillow maps a TIFF with a file name into memory, and swaps the sides of one that is to be
    rotated; without a name it reads it correctly.
    """
    if picture.format != "TIFF":
        picture.load()
        return
    file: Any = picture  # only pictures of files have a name
    name, file.filename = getattr(picture, "filename", ""), ""
    try:
        picture.load()
    finally:
        file.filename = name


def _orientation(picture: PIL.Image.Image) -> int | None:
    """Return the EXIF orientation of a loaded picture (TIFF is turned by its reader)."""
    try:
        return picture.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF: viewers show the picture without rotation
        return None


def _raw_mode(picture: PIL.Image.Image) -> str:
    """Return the raw mode of a PNG that is not loaded, such as "L;4"; else ""."""
    tile = getattr(picture, "tile", None)
    return str(tile[0].args) if tile and picture.format == "PNG" else ""


def _is_transparent(picture: PIL.Image.Image) -> bool:
    """Return whether a picture of 8 bits per channel has transparency."""
    if picture.mode in ("1", "L", "P", "RGB"):
        return picture.has_transparency_data
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa")


def _with_true_key(picture: PIL.Image.Image, raw: str) -> PIL.Image.Image:
    """Return the picture with its transparent value on the scale of its pixels.

    Pillow scales pixels of 2, 4 and 16 bits to 8, and leaves the transparent value unscaled.
    """
    scale = {"L;2": lambda v: v * 85, "L;4": lambda v: v * 17}.get(raw)
    if raw == "RGB;16B":
        scale = lambda values: tuple(v >> 8 for v in values)  # noqa: E731
    if scale is None or "transparency" not in picture.info:
        return picture
    scaled = picture.copy()
    scaled.info["transparency"] = scale(picture.info["transparency"])
    return scaled


def _on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return a transparent picture on a white background."""
    if picture.mode.endswith("a"):  # premultiplied
        *_, alpha = bands = np.moveaxis(np.asarray(picture), -1, 0)
        shown = [np.minimum(band, alpha) + (255 - alpha) for band in bands[:-1]]
        return from_array(np.stack(shown, -1)).convert("RGB")
    white = PIL.Image.new("RGB", picture.size, "white")
    for top in range(0, picture.height, STRIP):  # a full copy could take a gigabyte
        box = (0, top, picture.width, min(top + STRIP, picture.height))
        strip = picture.crop(box).convert("RGBA")
        white.paste(strip, box, mask=strip)
    return white


def _to_8_bit_grey(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Return a picture of mode F, I or I;16 in 8 bits."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        values = _to_uint8(values, top=255)
    elif picture.mode == "I":
        values = _to_uint8(_unsigned(values, picture.format in ("PNG", "PPM")))
    else:
        key = picture.info.get("transparency")
        clear = values == key if isinstance(key, int) else None
        if tags.get(BITS) == (12,):
            values = (values.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
        values = _to_uint8(values)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero
            values = 255 - values
        if clear is not None:
            values[clear] = 255
    return PIL.Image.fromarray(values)


def _unsigned(values: np.ndarray, has_16_bits: bool) -> np.ndarray:
    """Return int32 values as uint8, or as uint16 if they have 16 bits or are too large."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"its values range from {low} to {high}: scale them to 0 to 255, or 0 to 65535"
        )
    return values.astype(np.uint16 if has_16_bits or high > 255 else np.uint8)


def _to_uint8(values: np.ndarray, top: int = 1) -> np.ndarray:
    """Return bool, uint8, uint16 and float values as uint8 of the same shape.

    Args:
      values: An array of any shape.
      top: The largest valid float; if it is above 1, floats range to 255 where one is above 1.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((np.minimum(values, 65407) + 128) // 257).astype(np.uint8)  # rounded, no overflow
    if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
        raise ValueError(
            f"its values are {values.dtype.name}: give uint8, uint16, or floats from 0 to 1"
        )
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    slack = 1e-3 * top  # for rounding in 16 bits
    if not (-slack <= low and high <= top + slack):
        ask = "0 to 1" if top == 1 else "0 to 1, or 0 to 255"
        raise ValueError(f"its floats range from {low:g} to {high:g}: give finite ones from {ask}")
    scale = np.float32(255 if high <= 1 + 1e-3 else 1)
    result = np.empty(values.shape, np.uint8)
    for row, into in zip(values, result, strict=True):  # one by one: a copy of all takes gigabytes
        into[...] = np.rint(row.astype(np.float32) * scale).clip(0, 255)
    return result
