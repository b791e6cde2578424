"""Documents: pages of the LilyPond manuals, by their content, and handwritten digits.

Pages are split by manual. A page's label depends on its text layer: fonts and dot leaders.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import re
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageOps
import pypdfium2

from mllm_jax.data import packages
from mllm_jax.data.embedded import recipe

LILYPOND = packages.Deb(
    "lilypond-doc-pdf",
    "2.24.1-2",
    "caf7a8b1a7936abf59e6e1f5e20342fc50ce867ea7cd67dd8228665c4f70e5a1",
    "GFDL-1.3+",
    "https://lilypond.org",
)
SKLEARN = packages.Wheel(
    "scikit-learn",
    "1.9.1",
    "BSD-3-Clause (package); UCI digits: CC-BY-4.0",
    "https://scikit-learn.org",
)
FOLDER = "usr/share/doc/lilypond/html/Documentation/"
MANUALS = {
    "train": ("notation", "snippets", "internals", "contributor", "music-glossary", "changes"),
    "test": ("learning", "usage", "extending", "essay", "web"),
}
PAGES = ("sheet music", "a page of text", "a program listing", "a list of contents")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(f"the digit {number}" for number in NUMBERS)


def page_label(text: str, fonts: dict[str, float], drawn: int) -> str | None:
    """Return the label of a page; None if it has several kinds of content, or almost none.

    Args:
      text: Its text layer.
      fonts: The share of its characters by font name.
      drawn: The number of its lines and shapes: staves, stems, frames.
    """

    def share(name: str) -> float:
        return sum(part for font, part in fonts.items() if name in font)

    lines = text.splitlines()
    leaders = sum(bool(re.search(r"(\. ){4}|\.{5}", line)) for line in lines)
    music, typed = share("Emmentaler"), share("Mono")
    if "GNU Free Documentation License" in text:  # the same pages in every manual
        return None
    if len(lines) >= 20 and leaders > 0.6 * len(lines):
        return "a list of contents"
    if music > 0.15 and len(text) > 150:
        return "sheet music"
    if music or drawn > 8:
        return None
    if typed > 0.7 and len(text) > 400:
        return "a program listing"
    if typed < 0.3 and leaders == 0 and len(text) > 1500:
        return "a page of text"
    return None


def pages() -> Iterator[recipe.Candidate]:
    """Yield the pages that have a label."""
    names = {FOLDER + f"{m}.pdf": m for manuals in MANUALS.values() for m in manuals}
    files = LILYPOND.members(names.__contains__)
    for split, manuals in MANUALS.items():
        for manual in manuals:
            document = pypdfium2.PdfDocument(files[FOLDER + f"{manual}.pdf"])
            for number in range(len(document)):
                if label := page_label(*_content(document[number])):
                    yield recipe.Candidate(
                        name=f"{manual}-page{number + 1:03d}",
                        label=label,
                        group=manual,
                        source=f"{LILYPOND.name}: {manual}.pdf, page {number + 1}",
                        licence=LILYPOND.licence,
                        image=functools.partial(_render, document, number),
                        split=split,
                    )


def _content(page: pypdfium2.PdfPage, every: int = 5) -> tuple[str, dict[str, float], int]:
    """Return a page's text, the share of each font, sampled, and the number of drawn shapes."""
    layer = page.get_textpage()
    name, flags = ctypes.create_string_buffer(80), ctypes.c_int()
    fonts: dict[str, float] = collections.defaultdict(float)
    sampled = range(0, layer.count_chars(), every)
    for at in sampled:
        pypdfium2.raw.FPDFText_GetFontInfo(layer.raw, at, name, len(name), flags)
        fonts[name.value.decode("latin-1")] += 1 / len(sampled)
    path = pypdfium2.raw.FPDF_PAGEOBJ_PATH
    drawn = sum(1 for _ in page.get_objects(filter=(path,), max_depth=1))
    return layer.get_text_range(), fonts, drawn


def _render(document: pypdfium2.PdfDocument, number: int) -> PIL.Image.Image:
    """Return the page without its running head and its margins."""
    page = document[number].render(scale=1.0).to_pil().convert("L")
    page = page.crop((0, round(0.08 * page.height), *page.size))
    return recipe.squared(page.crop(PIL.ImageOps.invert(page).getbbox()), margin=0.03)


def digits() -> Iterator[recipe.Candidate]:
    """Yield the handwritten digits."""
    path = SKLEARN.file("datasets/data/digits.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    for index, row in enumerate(table):
        yield recipe.Candidate(
            name=f"digit-{index:04d}",
            label=DIGITS[row[-1]],
            group=f"digit {index}",
            source=f"{SKLEARN.name}: {path.name}, row {index}",
            licence=SKLEARN.licence,
            image=functools.partial(_digit, row[:-1].reshape(8, 8)),
        )


def _digit(ink: np.ndarray) -> PIL.Image.Image:
    """Return a digit, dark ink on white, from 8 x 8 pixels of 0 (none) to 16."""
    grey = 255 - np.minimum(ink.astype(np.int32) * 16, 255).astype(np.uint8)
    large = PIL.Image.fromarray(grey).resize((160, 160), PIL.Image.Resampling.BICUBIC)
    return recipe.squared(large, margin=0.2)


RECIPE = recipe.Recipe(
    name="documents",
    families=(recipe.Family(PAGES, test=12, train=70), recipe.Family(DIGITS, test=4, train=20)),
    sources=(LILYPOND, SKLEARN),
    parts=(pages, digits),
    note="pages: label from fonts and dot leaders, split by manual; digits: their class",
)
