"""A reader of pages that follows tags and gathers links and text."""

from __future__ import annotations

import html.parser

VOID = {"meta", "img", "link", "br", "input"}


class Reader(html.parser.HTMLParser):
    """Follows the tags, gathers links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
