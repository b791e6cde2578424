"""One function opens every picture, as a person sees it; oracles are of NumPy."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import random
import struct
import time
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from mllm_jax.processors import pictures
from tests.helpers import tiny

HEIGHT, WIDTH = 6, 9
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
ALPHA[:2] = [[0], [255]]  # rows of nothing and of all
GREY = RGB[..., 0]
WIDE = RNG.integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
WIDE[0, :2] = 0, 65535


def grey(values) -> np.ndarray:
    return np.repeat(np.asarray(values, np.float64)[..., None], 3, -1)


def on_white(colour, alpha) -> np.ndarray:
    share = np.asarray(alpha, np.float64)[..., None] / 255
    return colour * share + 255 * (1 - share)


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF calls the stored rows and columns: TIFF 6.0, tag 274."""
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom"}
    if orientation in rows:  # row 0 is at the top or the bottom, column 0 left or right
        values = values if rows[orientation] == "top" else values[::-1]
        return values if orientation in (1, 4) else values[:, ::-1]
    values = np.swapaxes(values, 0, 1)  # row 0 is at the left (5, 8) or at the right (6, 7)
    values = values if orientation in (5, 8) else values[:, ::-1]
    return values if orientation in (5, 6) else values[::-1]  # column 0 is at the top or bottom


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIELAB under D50, Bradford-adapted, to sRGB; L from 0 to 100 in 255, a and b around 128."""
    L, a, b = (lab[..., i].astype(np.float64) for i in range(3))
    fy = (L * 100 / 255 + 16) / 116
    f = np.stack([fy + (a - 128) / 500, fy, fy - (b - 128) / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * [0.9642, 1.0, 0.8249]
    linear = (
        xyz
        @ np.array(
            [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
        ).T
    )
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    h, s, v = (hsv[..., i].astype(np.float64) / 255 for i in range(3))
    sector = np.floor(h * 6)
    f = h * 6 - sector
    p, q, t = v * (1 - s), v * (1 - f * s), v * (1 - (1 - f) * s)
    choices = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)]
    out = np.zeros_like(hsv, np.float64)
    for number, choice in enumerate(choices):
        at = sector % 6 == number
        out[at] = np.stack(choice, -1)[at]
    return 255 * out


def ycbcr_to_rgb(ycc: np.ndarray) -> np.ndarray:
    y, cb, cr = (ycc[..., i].astype(np.float64) for i in range(3))
    rgb = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
         y + 1.772 * (cb - 128)], -1,
    )  # fmt: skip
    return rgb.clip(0, 255)


def palette_picture(**how) -> tuple[PIL.Image.Image, np.ndarray]:
    colours = np.random.default_rng(1).integers(0, 256, (16, 3), np.uint8)
    index = (GREY % 16).astype(np.uint8)
    picture = PIL.Image.fromarray(index).convert("L")
    picture = PIL.Image.frombytes("P", picture.size, index.tobytes())
    picture.putpalette(colours.tobytes())
    picture.info.update(how)
    alpha = np.full(16, 255)
    if isinstance(how.get("transparency"), bytes):
        alpha[: len(how["transparency"])] = list(how["transparency"])
    elif "transparency" in how:
        alpha[how["transparency"]] = 0
    return picture, on_white(colours[index].astype(float), alpha[index])


def modes() -> dict[str, tuple[PIL.Image.Image, np.ndarray]]:
    """Of each mode, a picture and what it shows: float[row, column, 3] of 0 to 255."""
    made = {}
    bits = GREY > 127
    made["1"] = PIL.Image.fromarray(bits), grey(bits * 255)
    made["L"] = PIL.Image.fromarray(GREY), grey(GREY)
    made["LA"] = PIL.Image.fromarray(np.stack([GREY, ALPHA], -1)), on_white(grey(GREY), ALPHA)
    made["P"] = palette_picture()
    made["P, clear index"] = palette_picture(transparency=5)
    made["P, clear bytes"] = palette_picture(transparency=bytes(range(0, 256, 17)))
    rgba = PIL.Image.fromarray(np.dstack([RGB, ALPHA]))
    made["RGB"] = PIL.Image.fromarray(RGB), RGB.astype(float)
    made["RGBA"] = rgba, on_white(RGB.astype(float), ALPHA)
    for mode, straight in (("RGBa", rgba), ("La", made["LA"][0])):
        picture = straight.convert(mode)
        values = np.asarray(picture, float)
        shown = np.broadcast_to(values[..., :-1] + 255 - values[..., -1:], RGB.shape)
        made[mode] = picture, shown
    picture, shown = palette_picture()
    pa = picture.convert("PA")
    pa.putalpha(PIL.Image.fromarray(ALPHA))
    made["PA"] = pa, on_white(shown, ALPHA)
    key = PIL.Image.fromarray(RGB)
    key.info["transparency"] = tuple(map(int, RGB[3, 4]))
    shown = RGB.astype(float)
    shown[(RGB[3, 4] == RGB).all(-1)] = 255
    made["RGB, clear colour"] = key, shown
    key = PIL.Image.fromarray(GREY)
    key.info["transparency"] = int(GREY[3, 4])
    made["L, clear value"] = key, grey(np.where(GREY[3, 4] == GREY, 255, GREY))
    cmyk = np.dstack([RGB, ALPHA])
    shown = (255 - RGB.astype(float)) * (255 - ALPHA[..., None].astype(float)) / 255
    made["CMYK"] = PIL.Image.frombytes("CMYK", (WIDTH, HEIGHT), cmyk.tobytes()), shown
    for mode, oracle in (("YCbCr", ycbcr_to_rgb), ("HSV", hsv_to_rgb)):
        made[mode] = PIL.Image.frombytes(mode, (WIDTH, HEIGHT), RGB.tobytes()), oracle(RGB)
    lab = np.dstack([GREY, 118 + RGB[..., 1:] % 20])
    picture = PIL.Image.merge("LAB", [PIL.Image.fromarray(lab[..., i]) for i in range(3)])
    made["LAB"] = picture, lab_to_rgb(lab)
    for mode, order in (("I;16", "<"), ("I;16L", "<"), ("I;16B", ">"), ("I;16N", "=")):
        raw = WIDE.astype(f"{order}u2").tobytes()
        try:
            made[mode] = PIL.Image.frombytes(mode, (WIDTH, HEIGHT), raw), grey(WIDE / 257)
        except (ValueError, KeyError):  # this Pillow has no such mode
            assert mode == "I;16N"
    made["I, 8 bits"] = PIL.Image.fromarray(GREY.astype(np.int32)), grey(GREY)
    made["I, 16 bits"] = PIL.Image.fromarray(WIDE.astype(np.int32)), grey(WIDE / 257)
    made["F, 0 to 1"] = PIL.Image.fromarray((GREY / 255).astype(np.float32)), grey(GREY)
    made["F, 0 to 255"] = PIL.Image.fromarray(GREY.astype(np.float32)), grey(GREY)
    return made


MODES = modes()
# Formats without loss that keep a mode, and turn by EXIF. TIFF alone has most of them.
FORMATS = {
    "PNG": {"1", "L", "LA", "P", "P, clear index", "P, clear bytes", "RGB", "RGBA", "I;16",
            "RGB, clear colour", "L, clear value"},
    "TIFF": {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B",
             "I, 8 bits", "I, 16 bits", "F, 0 to 1", "F, 0 to 255"},
    "WEBP": {"RGB", "RGBA"},
}  # fmt: skip


def saved(picture, format_: str, orientation: int | None = None) -> bytes:
    how = {"lossless": True, "exact": True} if format_ == "WEBP" else {}
    if "transparency" in picture.info:
        how["transparency"] = picture.info["transparency"]
    if orientation is not None:
        exif = PIL.Image.Exif()
        exif[pictures.ORIENTATION] = orientation
        how["exif"] = exif
    out = io.BytesIO()
    picture.save(out, format_, **how)
    return out.getvalue()


def assert_shows(picture, expected, name="the picture") -> None:
    shown = pictures.read(picture, name)
    assert (shown.mode, shown.size) == ("RGB", expected.shape[1::-1])
    np.testing.assert_allclose(np.asarray(shown, float), expected, atol=1.01)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_at_every_orientation_as_a_picture_of_pil(mode, orientation):
    picture, shown = MODES[mode]
    picture = picture.copy()
    picture.getexif()[pictures.ORIENTATION] = orientation
    before = picture.tobytes(), dict(picture.info)
    assert_shows(picture, turned(shown, orientation))
    assert (picture.tobytes(), dict(picture.info)) == before


@pytest.mark.parametrize("format_", FORMATS)
def test_every_mode_at_every_orientation_from_files(format_, tmp_path):
    for mode, orientation in itertools.product(sorted(FORMATS[format_]), range(1, 9)):
        picture, shown = MODES[mode]
        content = saved(picture, format_, orientation)
        expected = turned(shown, orientation)
        if (format_, mode) == ("TIFF", "I, 8 bits"):
            assert PIL.Image.open(io.BytesIO(content)).mode == "I"
        path = tmp_path / f"{orientation}.bin"
        path.write_bytes(content)
        for given in (path, str(path), content, bytearray(content), io.BytesIO(content)):
            assert_shows(given, expected, f"{mode} {orientation}")
        with PIL.Image.open(path) as lazy:
            assert_shows(lazy, expected)
        with path.open("rb") as file:
            assert_shows(file, expected)
            assert_shows(file, expected)  # from its beginning again


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_is_turned_and_its_adobe_inks_are_inks(orientation):
    flat = np.zeros((16, 32, 3), np.uint8)
    flat[:8, :16], flat[:8, 16:], flat[8:, :16] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    for mode in ("RGB", "CMYK", "L"):
        picture = PIL.Image.fromarray(flat).convert(mode)
        exif = PIL.Image.Exif()
        exif[pictures.ORIENTATION] = orientation
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=100, subsampling=0, exif=exif)
        expected = turned(np.asarray(picture.convert("RGB"), float), orientation)
        shown = np.asarray(pictures.read(out.getvalue()), float)
        assert np.abs(shown - expected).mean() < 3


class TestArrays:
    @pytest.mark.parametrize(
        ("array", "shown"),
        [
            (RGB, RGB.astype(float)),
            (GREY, grey(GREY)),
            (GREY[..., None], grey(GREY)),
            (np.dstack([RGB, ALPHA]), on_white(RGB.astype(float), ALPHA)),
            (WIDE, grey(WIDE / 257)),
            (WIDE.astype(">u2"), grey(WIDE / 257)),
            (np.dstack([RGB, ALPHA]).astype(np.uint16) * 257, on_white(RGB.astype(float), ALPHA)),
            (RGB / 255, RGB.astype(float)),
            ((RGB / 255).astype(np.float16), RGB.astype(float)),
            (np.dstack([RGB, ALPHA]) / 255, on_white(RGB.astype(float), ALPHA)),
            (GREY > 127, grey((GREY > 127) * 255)),
            (RGB[::-1, ::2], RGB[::-1, ::2].astype(float)),
            (np.asfortranarray(RGB), RGB.astype(float)),
        ],
    )
    def test_values_are_what_they_show(self, array, shown):
        assert_shows(array, shown)

    def test_sixteen_bits_are_divided_by_257_and_rounded(self):
        ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        expected = np.floor(ramp / 257 + 0.5).astype(np.uint8)
        np.testing.assert_array_equal(np.asarray(pictures.read(ramp))[..., 0], expected)

    def test_the_ramp_of_five(self):
        ramp = np.linspace(0, 65535, 5).astype(np.uint16)[None]
        for given in (ramp, PIL.Image.fromarray(ramp), PIL.Image.fromarray(ramp.astype(np.int32))):
            assert np.asarray(pictures.read(given))[0, :, 0].tolist() == [0, 64, 127, 191, 255]

    def test_of_jax_and_of_what_has_an_array(self):
        import jax.numpy as jnp

        class Tensor:
            def __array__(self, dtype=None, copy=None):
                return RGB

        assert_shows(jnp.asarray(RGB), RGB.astype(float))
        assert_shows(jnp.asarray(RGB / 255, jnp.float32), RGB.astype(float))
        assert_shows(Tensor(), RGB.astype(float))
        shown = np.asarray(pictures.read(jnp.asarray(RGB / 255, jnp.bfloat16)), float)
        np.testing.assert_allclose(shown, RGB, atol=1.01)  # bfloat16 has 8 bits

    @pytest.mark.parametrize(
        ("array", "says"),
        [
            (np.moveaxis(RGB, -1, 0), r"3 x 6 x 9 has its channels first: np\.moveaxis"),
            (GREY[None], "channels first"),
            (RGB[None], r"shape \(1 x 6 x 9 x 3\)"),
            (RGB[..., :2], r"shape \(6 x 9 x 2\)"),
            (np.zeros(4), r"shape \(4\)"),
            (np.array(3.0), r"shape \(\)"),
            (np.zeros((0, 4, 3), np.uint8), "no pixels"),
            (np.zeros((4, 0, 3), np.uint8), "no pixels"),
            (RGB / 255 * 2 - 1, "range from -.* give finite ones from 0 to 1"),
            (RGB.astype(np.float32), "range from 0 to 249: give"),
            (np.full((2, 2), np.nan), "nan"),
            (np.full((2, 2), np.inf), "inf"),
            (RGB.astype(np.int64), "values are int64: give uint8"),
            (RGB.astype(np.int8), "int8"),
            (np.full((2, 2), "a"), "values are str"),
            (np.full((2, 2), None), "values are object"),
            (np.full((2, 2), 1j), "complex"),
            (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "67,108,864 pixels"),
        ],
    )
    def test_what_shows_nothing_certain_is_refused(self, array, says):
        refused(array, says)

    @pytest.mark.parametrize(
        "values", [[[-1.0, 0.5]], [[0.0, 256.0]], [[np.nan, 0.0]], [[0.0, np.inf]]]
    )
    def test_mode_f_out_of_range(self, values):
        refused(PIL.Image.fromarray(np.array(values, np.float32)), "finite ones from 0 to 1, or")

    @pytest.mark.parametrize("values", [[[-1, 5]], [[0, 65536]], [[-(2**31), 2**31 - 1]]])
    def test_mode_i_out_of_range(self, values):
        refused(PIL.Image.fromarray(np.array(values, np.int32)), "values range from .*: scale them")


def refused(picture, says: str, name: str = "the picture") -> str:
    started = time.monotonic()
    with pytest.raises(ValueError, match=says) as caught:
        pictures.read(picture, name)
    assert time.monotonic() - started < 5
    (text,) = caught.value.args
    assert len(text) < 400
    assert "\n" not in text
    if isinstance(picture, (str, os.PathLike)):
        assert str(picture)[-60:] in text
    else:
        assert name in text
    return text


def png(width: int, height: int, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: what no writer of Pillow makes."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        check = zlib.crc32(name + content)
        out += struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
    return out


class TestRareFiles:
    @pytest.mark.parametrize(("depth", "scale"), [(1, 255), (2, 85), (4, 17), (8, 1)])
    def test_the_clear_grey_of_a_png_of_few_bits(self, depth, scale):
        rows = zlib.compress(b"\x00" + bytes([0b01 << (8 - min(depth, 2)) if depth < 8 else 1]))
        if depth == 4:
            rows = zlib.compress(b"\x00\x12")  # values 1 and 2
        width = {1: 1, 2: 1, 4: 2, 8: 1}[depth]
        if depth == 1:
            rows = zlib.compress(b"\x00\x80")
        clear = png(width, 1, depth, 0, (b"tRNS", b"\x00\x01"), (b"IDAT", rows))
        solid = png(width, 1, depth, 0, (b"IDAT", rows))
        assert pictures.read(solid).getpixel((0, 0))[0] == scale
        assert pictures.read(clear).getpixel((0, 0))[0] == 255
        if depth == 4:
            assert pictures.read(clear).getpixel((1, 0))[0] == 2 * 17

    def test_the_clear_colour_of_a_png_of_16_bits(self):
        rows = zlib.compress(b"\x00" + bytes([10, 1, 20, 2, 30, 3, 11, 1, 20, 2, 30, 3]))
        key = bytes([10, 1, 20, 2, 30, 3])
        shown = pictures.read(png(2, 1, 16, 2, (b"tRNS", key), (b"IDAT", rows)))
        assert shown.getpixel((0, 0)) == (255, 255, 255)
        assert shown.getpixel((1, 0)) == (11, 20, 30)
        rows = zlib.compress(b"\x00" + bytes([10, 1, 10, 2]))
        shown = pictures.read(png(2, 1, 16, 0, (b"tRNS", b"\x0a\x01"), (b"IDAT", rows)))
        assert shown.getpixel((0, 0)) == (255, 255, 255)
        assert shown.getpixel((1, 0)) == (10, 10, 10)

    def test_a_grey_pgm_of_16_bits_is_of_16_bits_though_dark(self):
        shown = pictures.read(b"P5 2 1 65535\n\x00\xc8\x01\x01")
        assert [shown.getpixel((x, 0))[0] for x in (0, 1)] == [1, 1]

    def test_a_tiff_of_12_bits_and_one_whose_zero_is_white(self):
        def tiff(bits: int, photometric: int, content: bytes) -> bytes:
            tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 128),
                    (277, 1), (278, 1), (279, len(content))]  # fmt: skip
            entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
            head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + b"\0" * 4
            return head.ljust(128, b"\0") + content.ljust(8, b"\0")

        shown = pictures.read(tiff(16, 0, struct.pack("<2H", 0, 65535)))
        assert [shown.getpixel((x, 0))[0] for x in (0, 1)] == [255, 0]
        shown = pictures.read(tiff(12, 1, bytes([0xFF, 0xF8, 0x00])))
        assert [shown.getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]

    def test_an_animation_shows_its_first_frame(self):
        frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        for format_ in ("GIF", "WEBP", "PNG", "TIFF"):
            out = io.BytesIO()
            frames[0].save(out, format_, save_all=True, append_images=frames[1:])
            assert pictures.read(out.getvalue()).getpixel((3, 3))[1] < 9

    def test_mpo_and_jpeg_2000_and_bmp(self):
        flat = PIL.Image.new("RGB", (16, 8), (10, 200, 30))
        for format_ in ("MPO", "JPEG2000", "BMP", "PPM", "AVIF"):
            if format_ not in PIL.Image.SAVE:
                PIL.Image.init()
            out = io.BytesIO()
            flat.save(out, format_)
            np.testing.assert_allclose(pictures.read(out.getvalue()), np.asarray(flat), atol=4)

    def test_damaged_exif_leaves_the_picture_as_it_lies(self):
        out = io.BytesIO()
        picture = PIL.Image.new("RGB", (4, 2), "red")
        picture.save(out, "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff")
        assert pictures.read(out.getvalue()).size == (4, 2)
        exif = PIL.Image.Exif()
        exif[pictures.ORIENTATION] = 9
        out = io.BytesIO()
        picture.save(out, "JPEG", exif=exif)
        assert pictures.read(out.getvalue()).size == (4, 2)


def test_a_picture_is_laid_on_white_strip_by_strip(monkeypatch):
    monkeypatch.setattr(pictures, "STRIP", 4)
    for mode in ("RGBA", "LA", "PA", "P, clear index", "RGB, clear colour"):
        assert_shows(*MODES[mode])


class TestRefused:
    def test_a_bomb_is_not_decoded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PIL.Image.Image, "load", lambda *_: pytest.fail("decoded"))
        path = tmp_path / "bomb.png"
        for side, rest in ((8193, 8193), (30000, 30000), (2**31 - 1, 2**31 - 1)):
            path.write_bytes(png(side, rest, 8, 2, (b"IDAT", zlib.compress(b"\0" * 999))))
            refused(path, "pixels")
        refused(png(20000, 8, 8, 2, (b"IDAT", b"")), "one side over 500 times the other")
        refused(PIL.Image.new("1", (9000, 9000)), "67,108,864 pixels")

    def test_truncated_and_foreign_files(self, tmp_path):
        whole = saved(MODES["RGB"][0].resize((64, 64)), "PNG")
        path = tmp_path / "a.png"
        for content, says in (
            (whole[: len(whole) // 2], "."), (whole[:20], "Truncated"), (b"", "it is empty"),
            (b"hello", "unsupported format"), (b"<!doctype html><html>", "a web page"),
            (b"\x00\x00\x00\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read.*convert"),
            (b"%PDF-1.7", "PDF"), (b"<svg xmlns='x'/>", "SVG"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ):  # fmt: skip
            path.write_bytes(content)
            refused(path, says)
            refused(content, says)
            refused(io.BytesIO(content), says, "picture 3 of row 2")

    def test_postscript_starts_no_program(self, tmp_path, monkeypatch):
        import subprocess

        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program"))
        path = tmp_path / "x.png"
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
        path.write_bytes(eps)
        refused(path, "PostScript")
        refused(PIL.Image.open(io.BytesIO(eps)), "PostScript")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_what_is_no_regular_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
        for name, says in (
            ("pipe.png", "pipe or a device"), ("zero.png", "pipe or a device"), ("", "a folder"),
            ("loop.png", "symbolic links"), ("absent.png", "No such file"),
        ):  # fmt: skip
            refused(tmp_path / name, says)
        with open("/dev/zero", "rb") as file:
            refused(file, "pipe or a device")
        with pytest.raises(ValueError, match=r"picture a\\x00b.png: embedded null"):
            pictures.read("a\0b.png")
        refused(pathlib.Path("x" * 5000 + ".png"), "too long")
        refused("line\nbreak.png".replace("\n", "\\n"), "No such file")

    def test_a_large_file_is_not_read(self, tmp_path):
        path = tmp_path / "large.png"
        with path.open("wb") as file:
            file.truncate(pictures.MAX_BYTES + 1)
        refused(path, "314,572,801 bytes")

    @pytest.mark.parametrize("given", [None, 3, {"a": 1}, object(), open])
    def test_what_is_no_picture(self, given):
        refused(given, "is not a picture: give a path", "picture 3 of row 2")

    def test_a_file_open_as_text_and_a_closed_picture(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(saved(MODES["RGB"][0], "PNG"))
        closed = PIL.Image.open(path)
        closed.close()
        refused(closed, ".")
        path.write_text("text")
        with path.open() as file:
            refused(file, "open in text mode")


class TestProcessor:
    def test_all_that_shows_the_same_gives_the_same_pixels(self, tiny_config, tmp_path):
        made = tiny.processor(tiny_config)
        picture = tiny.picture(0)
        path = tmp_path / "a.png"
        turned_ = picture.transpose(PIL.Image.Transpose.ROTATE_90)
        path.write_bytes(saved(turned_, "PNG", 6))
        array = np.asarray(picture)
        given = [picture, array, array / 255, path, str(path), path.read_bytes()]
        pixels = made(given, ["what ?"] * len(given)).pixels
        for other in pixels[1:]:
            np.testing.assert_array_equal(other, pixels[0])

    def test_errors_name_the_place(self, tiny_config):
        made = tiny.processor(tiny_config)
        with pytest.raises(ValueError, match="cannot read picture 1 of row 2: NoneType"):
            made([[RGB], [RGB], [RGB, None]], ["a", "b", "c"])

    def test_a_panorama_is_not_padded_to_a_gigabyte(self):
        from mllm_jax.processors.image_processors import pad_to_square

        with pytest.raises(ValueError, match=r"20000 x 50 .*more than 67,108,864 pixels"):
            pad_to_square(PIL.Image.new("RGB", (20000, 50)), [0, 0, 0])


def corrupted(content: bytes, seed: int) -> bytes:
    """Flipped, cut, repeated, or with foreign numbers, as the seed says."""
    draw = random.Random(seed)
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8, 40])):
        at = draw.randrange(draw.choice([64, len(content)]) % (len(content) + 1) + 1)
        kind = draw.randrange(5)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.choice([1, 10, len(content) // 2])]
        elif kind == 2:
            content[at:at] = draw.randbytes(draw.choice([1, 4, 64]))
        elif kind == 3:
            content[at : at + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        else:
            content[at:at] = content[: draw.choice([8, 300])]
    return bytes(content)


@pytest.fixture(scope="module")
def files_of_all_formats() -> list[bytes]:
    made = []
    for format_, names in FORMATS.items():
        made += [saved(MODES[name][0], format_, 6) for name in sorted(names)]
    frames = [PIL.Image.fromarray(a).resize((40, 30)) for a in (RGB, 255 - RGB)]
    for format_ in ("JPEG", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "MPO", "WEBP"):
        PIL.Image.init()
        several = format_ in ("GIF", "MPO", "WEBP")
        out = io.BytesIO()
        frames[0].save(
            out, format_, **({"save_all": True, "append_images": frames[1:]} if several else {})
        )
        made.append(out.getvalue())
    return made


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("start", "count"), [(0, 200), pytest.param(10**6, 10_000, marks=pytest.mark.slow)]
)
def test_corrupted_files_are_shown_or_refused_in_one_line(
    files_of_all_formats, tmp_path, start, count
):
    path = tmp_path / "picture.png"
    for seed in range(start, start + count):
        content = corrupted(files_of_all_formats[seed % len(files_of_all_formats)], seed)
        path.write_bytes(content)
        started = time.process_time()
        try:
            shown = pictures.read(path)
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"cannot read the picture {path}"), (seed, text)
            assert len(text) < 400, (seed, text)
            assert "\n" not in text, (seed, text)
        else:
            assert shown.mode == "RGB", seed
            assert shown.width * shown.height <= pictures.MAX_PIXELS, seed
        assert time.process_time() - started < 5, seed
