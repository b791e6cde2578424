"""Pictures as a person sees them: one function opens every picture of the library.

    pictures.read("scan.png")        # also bytes, an open file, an array, a picture of PIL

The picture comes turned by its EXIF orientation, with transparency laid on white, in 8 bits a
channel. Of an animation, or a file of several pages, it is the first frame. Colour profiles are
not applied.
"""

from __future__ import annotations

import io
import os
import stat

import numpy as np
import PIL.Image
import PIL.ImageCms

from mllm_jax import files

# What is opened, by Pillow's names; JPEG includes MPO. HEIF is there once a program has called
# pillow_heif.register_heif_opener(). Never a format that starts a program: EPS, PDF.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
EXTENSIONS = {  # of files that are taken for pictures, in lower case
    ".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif",
}  # fmt: skip
MAX_PIXELS = 2**26  # of one picture, 8192 x 8192; a few kilobytes can decode to gigabytes
MAX_RATIO = 500  # of a picture's sides: image processors scale the shorter one up to a tile
MAX_BYTES = 300 * 2**20  # of one file
STRIP = 512  # rows that are converted at one time
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
OTHER_FORMATS = (  # how files begin that are taken for pictures
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


def read(picture, name: str = "the picture") -> PIL.Image.Image:
    """A picture in RGB, 8 bits a channel, as a viewer shows it.

    Values of more than 8 bits are scaled to what they show: 16 bits by 1/257. Mode I is of 16 bits
    where its file says so, else of 8 bits if no value is above 255, of 16 bits otherwise. Mode F is
    from 0 to 1 if no value is above 1, else from 0 to 255.

    Args:
      picture: a path; the bytes of a file, or the file, opened in binary mode; an array (of NumPy,
        JAX, torch) [row, column], or [row, column, channels] with 1, 3 or 4 channels, the fourth
        alpha: uint8, uint16, bool, or float from 0 to 1; or a picture of PIL, opened or not yet.
      name: what an error calls it, where it has no path.

    Raises:
      ValueError: it cannot be read, or shows nothing certain; one line with its path or name.
    """
    if isinstance(picture, (str, os.PathLike)):
        name = f"the picture {files.name(picture)}"
    try:
        return _shown(_opened(picture))
    except Exception as error:  # whatever a decoder raises over damaged bytes
        raise ValueError(f"cannot read {name}: {files.reason(error)}") from error


def from_array(values: np.ndarray) -> PIL.Image.Image:
    """An array [row, column] or [row, column, channels] as a picture of PIL; see `read`."""
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
    return PIL.Image.fromarray(np.ascontiguousarray(_in_8_bits(values)))


def _opened(picture) -> PIL.Image.Image:
    """A picture of PIL, its size checked, its pixels perhaps not yet decoded."""
    if isinstance(picture, PIL.Image.Image):
        if picture.format == "EPS":
            raise ValueError("it is PostScript, which would start a program: save it as PNG")
        _check_size(*picture.size)
        return picture
    if isinstance(picture, (str, os.PathLike)):
        return _decoder(files.read_bytes(picture, MAX_BYTES))
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return _decoder(bytes(picture))
    if hasattr(picture, "read"):
        return _decoder(_content(picture))
    if hasattr(picture, "__array__"):
        return from_array(np.asarray(picture))
    raise ValueError(
        f"{type(picture).__name__} is no picture: give a path, bytes, an array or a picture of PIL"
    )


def _content(file) -> bytes:
    """All bytes of an open file, from its beginning where it has one."""
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
        raise ValueError("the file is open as text: open it in mode 'rb'")
    if len(content) > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES:,} bytes")
    return content


def _decoder(content: bytes) -> PIL.Image.Image:
    """The picture of a file's bytes: its header is read, its pixels are not."""
    PIL.Image.init()
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]
    try:
        picture = PIL.Image.open(io.BytesIO(content), formats=formats)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(_what_else(content)) from error
    _check_size(*picture.size)
    return picture


def _what_else(content: bytes) -> str:
    """Why bytes are no picture that can be opened."""
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
    return f"it is damaged, or in a format that is not read ({known} are)"


def _check_size(width: int, height: int) -> None:
    """Refuses, before anything is decoded, a picture without pixels or with too many."""
    size = f"{width} x {height} (width x height)"
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels: {size}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it is of {size}, more than {MAX_PIXELS:,} pixels: make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"it is of {size}, one side over {MAX_RATIO} times the other: crop it")


def _shown(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in RGB, decoded, turned, on white."""
    raw = _raw_mode(picture)
    _load(picture)
    turn = TRANSPOSES.get(_orientation(picture))
    if picture.mode.startswith(("I", "F")):
        shown = _grey(picture).convert("RGB")
    elif picture.mode == "LAB":
        lab, srgb = map(PIL.ImageCms.createProfile, ("LAB", "sRGB"))
        exact = PIL.ImageCms.Flags.NOOPTIMIZE  # else dark colours are off by 3
        shown = PIL.ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB", flags=exact)
    elif _is_transparent(picture):
        shown = _on_white(_with_true_key(picture, raw))
    else:
        shown = picture.convert("RGB")
    return shown if turn is None else shown.transpose(turn)


def _load(picture: PIL.Image.Image) -> None:
    """Decodes the pixels.

    Pillow maps a TIFF that has a file's name into memory, and one that is to be turned with its
    sides exchanged: without a name it reads it right.
    """
    if picture.format != "TIFF":
        picture.load()
        return
    name, picture.filename = getattr(picture, "filename", ""), ""
    try:
        picture.load()
    finally:
        picture.filename = name


def _orientation(picture: PIL.Image.Image) -> int | None:
    """What EXIF says, once the picture is loaded (TIFF is turned by its reader)."""
    try:
        return picture.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF: viewers show the picture as it lies
        return None


def _raw_mode(picture: PIL.Image.Image) -> str:
    """How a PNG stores its pixels, as long as it is not loaded: "L;4"."""
    tile = getattr(picture, "tile", None)
    return str(tile[0].args) if tile and picture.format == "PNG" else ""


def _is_transparent(picture: PIL.Image.Image) -> bool:
    """Whether a picture of 8 bits a channel has transparency that its mode can have."""
    if picture.mode in ("1", "L", "P", "RGB"):
        return picture.has_transparency_data
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa")


def _with_true_key(picture: PIL.Image.Image, raw: str) -> PIL.Image.Image:
    """The picture, its transparent value in the units of its pixels.

    Pillow scales pixels of 2, 4 and 16 bits to 8, and leaves the value as it was.
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
    if picture.mode.endswith("a"):  # premultiplied
        *_, alpha = bands = np.moveaxis(np.asarray(picture), -1, 0)
        shown = [np.minimum(band, alpha) + (255 - alpha) for band in bands[:-1]]
        return from_array(np.stack(shown, -1)).convert("RGB")
    white = PIL.Image.new("RGB", picture.size, "white")
    for top in range(0, picture.height, STRIP):  # a copy of all takes a gigabyte
        box = (0, top, picture.width, min(top + STRIP, picture.height))
        strip = picture.crop(box).convert("RGBA")
        white.paste(strip, box, mask=strip)
    return white


def _grey(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of mode F, I or I;16 in 8 bits."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        values = _in_8_bits(values, top=255)
    elif picture.mode == "I":
        values = _in_8_bits(_unsigned(values, picture.format in ("PNG", "PPM")))
    else:
        key = picture.info.get("transparency")
        clear = values == key if isinstance(key, int) else None
        if tags.get(BITS) == (12,):
            values = (values.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
        values = _in_8_bits(values)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero
            values = 255 - values
        if clear is not None:
            values[clear] = 255
    return PIL.Image.fromarray(values)


def _unsigned(values: np.ndarray, wide: bool) -> np.ndarray:
    """int32 values as what they are: uint8, or uint16 if they are known to be, or too large."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"its values reach from {low} to {high}: scale them to 0 to 255, or 0 to 65535"
        )
    return values.astype(np.uint16 if wide or high > 255 else np.uint8)


def _in_8_bits(values: np.ndarray, top: int = 1) -> np.ndarray:
    """uint8 of an array's shape: what bool, uint8, uint16 and float values show.

    Args:
      values: of any shape.
      top: the most that a float may be; above 1, floats are from 0 to 255 if one is above 1.
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
    slack = 1e-3 * top  # what rounding in 16 bits adds
    if not (-slack <= low and high <= top + slack):
        ask = "0 to 1" if top == 1 else "0 to 1, or 0 to 255"
        raise ValueError(f"its floats reach from {low:g} to {high:g}: give finite ones from {ask}")
    scale = np.float32(255 if high <= 1 + 1e-3 else 1)
    made = np.empty(values.shape, np.uint8)
    for row, into in zip(values, made, strict=True):  # one by one: a copy of all takes gigabytes
        into[...] = np.rint(row.astype(np.float32) * scale).clip(0, 255)
    return made
