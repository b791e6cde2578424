"""What a notebook shows of a pass."""

from __future__ import annotations

import html.parser

import numpy as np

from mllm_jax.interventions import captures, receipts, run

RECEIPT = receipts.Receipt(
    "ablate <lm>", np.array([0, 4, 4]), np.array([0, 7, 2]), np.array([0.0, 3.0, 4.0])
)


def cells(text: str) -> list[str]:
    found = []

    class Reader(html.parser.HTMLParser):
        def handle_data(self, data):
            found.append(data)

    Reader().feed(text)
    return found


def test_a_receipt():
    assert str(RECEIPT) == "ablate <lm>: layers 1-2, 4 tokens, 9 elements changed, norm 5"
    assert cells(RECEIPT._repr_html_())[5:] == ["ablate <lm>", "layers 1-2", "4", "9", "5"]


def test_a_pass():
    lens = captures.Lens(
        np.zeros((2, 1, 3, 5), np.int32), np.zeros((2, 1, 3, 5)), np.zeros((2, 1, 3))
    )
    out = run.Out(np.zeros((1, 9), np.float32), {"say": lens}, (RECEIPT,))
    shown = cells(out._repr_html_())
    assert shown[5:10] == ["ablate <lm>", "layers 1-2", "4", "9", "5"]
    assert shown[10:16] == ["array", "shape", "type", "logits", "[1, 9]", "float32"]
    assert shown[16:19] == ["say.ids", "[2, 1, 3, 5]", "int32"]
    plain = run.Out(None, {}, ())
    assert cells(plain._repr_html_()) == ["array", "shape", "type"]
