"""Escape text, attributes and data in HTML, so that names and answers stay text."""

from __future__ import annotations

import html
import json
import re
from typing import Any

# Control characters that reorder the text around them: embeddings, overrides, isolates.
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


def text(value: str) -> str:
    """Return a text as HTML."""
    return html.escape(plain(value), quote=False)


def attribute(value: str) -> str:
    """Return a text as the value of an attribute in double quotes."""
    return html.escape(plain(value))


def plain(value: str) -> str:
    """Replace the control characters that would reorder the text after them."""
    return BIDI.sub("\N{REPLACEMENT CHARACTER}", value)


def data(value: Any) -> str:
    """Return JSON in a script element, which is read as data and never run.

    Args:
      value: Plain JSON values without NaN.
    """
    encoded = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # No text of a data element can end it, or begin a comment.
    encoded = encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json">{plain(encoded)}</script>'
