"""Pictures of one split that are near copies of another's are left out."""

from __future__ import annotations

import io
import logging

import numpy as np
import PIL.Image
import pytest

from mllm_jax.data import domains, near_copies


def example(number: int, pixels: np.ndarray) -> domains.Example:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return domains.Example(str(number), "own", "a label", file.getvalue(), ())


def pixels(seed: int) -> np.ndarray:
    rough = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return np.kron(rough, np.ones((8, 8, 1), np.uint8))


def test_copies_brighter_ones_and_mirrored_ones_are_left_out(caplog):
    seen = [example(i, pixels(i)) for i in range(3)]
    brighter = np.clip(pixels(1) // 2 + 60, 0, 255).astype(np.uint8)
    offered = [pixels(0), pixels(10), brighter, pixels(11), pixels(2)[:, ::-1], pixels(12)]
    test = domains.Domain("own", "test", [example(10 + i, p) for i, p in enumerate(offered)])
    with caplog.at_level(logging.WARNING):
        kept = near_copies.leave_out(test, iter(seen), 3)
    assert [e.id for e in kept] == ["11", "13", "15"] and kept.name == "own"
    assert "3 pictures of its test split are near copies" in caplog.text
    assert near_copies.leave_out(test, [], 3) is test
    assert [e.id for e in near_copies.leave_out(test, iter(seen), 1)] == ["11"]


def test_of_distinct_pictures_nothing_is_left_out(caplog):
    test = domains.Domain("own", "test", [example(i, pixels(i)) for i in range(3)])
    assert near_copies.leave_out(test, [example(9, pixels(9))], 2) is test
    assert not caplog.text


def test_nothing_but_copies_is_refused():
    test = domains.Domain("own", "test", [example(1, pixels(1))])
    with pytest.raises(ValueError, match="domain 'own': all 1 pictures of its test split are near"):
        near_copies.leave_out(test, test, 1)
