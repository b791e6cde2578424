"""Parts of a page about single units: pictures with marked patches, words, and histograms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mllm_jax.report import markup

COLOURS = ("#0072B2", "#9AA4AE")  # of the series of a histogram


class Box(NamedTuple):
    """A patch of a picture: its row and column, and the rows and columns of the grid."""

    row: int
    column: int
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Card:
    """A picture, or a text, with a caption.

    Attributes:
      caption: The text below.
      image: The path of the picture, if any.
      alt: The text for readers who cannot see the picture.
      box: The patch that is marked, if any.
      before: The end of the text before the word.
      word: The word that is marked, if any.
    """

    caption: str
    image: str = ""
    alt: str = ""
    box: Box | None = None
    before: str = ""
    word: str | None = None

    def html(self) -> str:
        """Return the card as an item of a list."""
        parts = [self._picture()] if self.image else []
        if self.word is not None:
            word = f"<code>{markup.text(visible(self.word))}</code>"
            parts.append(f"<div>{markup.text(self.before)}{word}</div>")
        return f"<li>{''.join(parts)}<div>{markup.text(self.caption)}</div></li>"

    def _picture(self) -> str:
        path, alt = markup.attribute(self.image), markup.attribute(self.alt)
        mark = ""
        if self.box:
            row, column, rows, columns = self.box
            style = (
                f"left:{100 * column / columns:.3f}%;top:{100 * row / rows:.3f}%;"
                f"width:{100 / columns:.3f}%;height:{100 / rows:.3f}%"
            )
            mark = f'<span class="patch" style="{style}"></span>'
        image = f'<img src="{path}" alt="{alt}" loading="lazy">'
        return f'<div class="seen">{image}{mark}</div>'


@dataclasses.dataclass(frozen=True)
class Cards:
    """A list of cards below a heading."""

    title: str
    cards: Sequence[Card]

    def html(self) -> str:
        """Return the list as HTML."""
        items = "".join(card.html() for card in self.cards)
        return f'<h3>{markup.text(self.title)}</h3><ul class="cards">{items}</ul>'


@dataclasses.dataclass(frozen=True)
class Words:
    """Words in order below a heading."""

    title: str
    words: Sequence[str]

    def html(self) -> str:
        """Return the words as HTML."""
        words = " ".join(f"<code>{markup.text(visible(word))}</code>" for word in self.words)
        return f'<h3>{markup.text(self.title)}</h3><p class="words">{words}</p>'


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A histogram of values, with a row of bars for each series, on a logarithmic scale.

    Attributes:
      title: The heading.
      edges: The inner edges of the bins.
      series: {name: counts}, the counts of len(edges) + 1 bins; at most two series.
    """

    title: str
    edges: Sequence[float]
    series: Mapping[str, Sequence[int]]

    def html(self) -> str:
        """Return the histogram as a drawing whose bars show their share on hover."""
        bins, width, height = len(self.edges) + 1, 20, 80
        slot = width / len(self.series)
        bars: list[str] = []
        legend: list[str] = []
        for s, (name, counts) in enumerate(self.series.items()):
            total = max(sum(counts), 1)
            for i, count in enumerate(counts):
                share = count / total
                size = height * max(0.0, 1 + math.log10(share) / FLOOR) if count else 0
                what = f"{name}: {share:.3%} of {total:,} values {self._range(i)}"
                bars.append(
                    f'<rect x="{i * width + s * slot:g}" y="{height - size:.2f}" '
                    f'width="{slot - 1:g}" height="{size:.2f}" style="fill:{COLOURS[s]}">'
                    f"<title>{markup.text(what)}</title></rect>"
                )
            legend.append(f'<span style="color:{COLOURS[s]}">\N{BLACK SQUARE}</span> '
                        f"{markup.text(name)}")  # fmt: skip
        ticks = "".join(
            f'<text x="{i * width}" y="{height + 11}" text-anchor="middle">{edge:g}</text>'
            for i, edge in enumerate(self.edges, 1)
        )
        label = f"{self.title}, {' and '.join(self.series)}"
        return (
            f"<h3>{markup.text(self.title)}</h3>"
            f'<svg class="histogram" style="max-width:{1.6 * bins:g}rem" '
            f'viewBox="0 0 {bins * width} {height + 14}" role="img" '
            f'aria-label="{markup.attribute(label)}">{"".join(bars)}{ticks}</svg>'
            f'<p class="note">{" · ".join(legend)}; shares from 0.001 % to all, logarithmic.</p>'
        )

    def _range(self, index: int) -> str:
        if index == 0:
            return f"below {self.edges[0]:g}"
        if index == len(self.edges):
            return f"at or above {self.edges[-1]:g}"
        return f"from {self.edges[index - 1]:g} to {self.edges[index]:g}"


FLOOR = 5  # powers of ten below one at which a bar has no height


@dataclasses.dataclass(frozen=True)
class WordMap:
    """A picture beside the words that a lens reads at each patch, with a slider over the layers.

    Attributes:
      image: The path of the picture.
      alt: The text for readers who cannot see it.
      layers: int[L], the layers.
      grid: The rows and columns of patches.
      vocabulary: The words that occur.
      words: int[L][P][k], the most likely words of each patch, as indices of the vocabulary.
      maps: {name: float[L][P]}, values by which the patches can be shaded; [1][P] where they do
        not depend on the layer.
    """

    image: str
    alt: str
    layers: Sequence[int]
    grid: tuple[int, int]
    vocabulary: Sequence[str]
    words: Sequence[Sequence[Sequence[int]]]
    maps: Mapping[str, Sequence[Sequence[float]]]

    def html(self) -> str:
        """Return the map as HTML; the script of the page creates its cells."""
        rows, columns = self.grid
        data = markup.data(
            {"layers": list(self.layers), "rows": rows, "columns": columns,
             "vocabulary": [visible(word) for word in self.vocabulary],
             "words": self.words, "maps": self.maps}
        )  # fmt: skip
        last = len(self.layers) - 1
        options = "".join(f"<option>{markup.text(name)}</option>" for name in self.maps)
        path, alt = markup.attribute(self.image), markup.attribute(self.alt)
        return (
            f'<div class="wordmap">{data}<div class="controls">'
            f'<label>Layer <input type="range" min="0" max="{last}" value="{last}"></label>'
            f'<output class="layer"></output><label>Shading <select>{options}</select></label>'
            '<span class="scale"></span></div>'
            f'<div class="map"><div class="seen"><img src="{path}" alt="{alt}">'
            '<span class="patch" style="display:none"></span></div>'
            f'<div class="cells" role="group" aria-label="Words at the patches"></div></div>'
            '<p class="reply words" aria-live="polite"></p></div>'
        )


def visible(word: str) -> str:
    """Return a token with visible signs in place of white space."""
    word = word.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    return word if word.strip() else "\N{OPEN BOX}"
