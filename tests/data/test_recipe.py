"""Splitting, balancing and the check for near copies, on painted candidates."""

from __future__ import annotations

import collections

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from mllm_jax.data import packages
from mllm_jax.data.embedded import recipe


def painted(seed: int) -> PIL.Image.Image:
    """A random picture of large blots, unlike any other."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return PIL.Image.fromarray(noise).resize((recipe.SIZE, recipe.SIZE))


def candidate(
    number: int, label: str, group: str | None = None, split: str | None = None, image=None
):
    image = image or (lambda: painted(number))
    return recipe.Candidate(f"c{number}", label, group or f"g{number}", "here", "CC0", image, split)


def made(candidates, test=3, train=4) -> recipe.Recipe:
    families = (recipe.Family(("a", "b"), test, train),)
    return recipe.Recipe("toys", families, (), (lambda: candidates,), "")


def chosen(candidates, **quotas) -> dict[str, list[recipe.Picture]]:
    found, missing = recipe.find(made(candidates, **quotas))
    assert not missing
    sides = {"test": [], "train": []}
    for side, picture in recipe.choose(made(candidates, **quotas), found):
        sides[side].append(picture)
    return sides


def test_quotas_are_met_and_labels_alternate():
    sides = chosen([candidate(n, "ab"[n % 2]) for n in range(40)])
    for side, each in (("test", 3), ("train", 4)):
        labels = [picture.candidate.label for picture in sides[side]]
        assert collections.Counter(labels) == {"a": each, "b": each}
        assert labels[0] != labels[1]


def test_no_group_is_on_both_sides():
    candidates = [candidate(n, "ab"[n // 3 % 2], group=f"g{n // 3}") for n in range(60)]
    sides = recipe.split_by_group(candidates, lambda label: 7)
    groups = [{c.group for c in members} for members in sides.values()]
    assert all(groups)
    assert not groups[0] & groups[1]
    counts = collections.Counter(c.label for c in sides["test"])
    assert counts == {"a": 6, "b": 6}  # whole groups of three


def test_a_source_may_decide_the_split():
    candidates = [candidate(n, "a", f"s{n % 2}", ("test", "train")[n % 2]) for n in range(8)]
    sides = recipe.split_by_group(candidates, lambda label: 1)
    assert {c.split for c in sides["test"]} == {"test"}
    assert len(sides["test"]) == 4
    with pytest.raises(ValueError, match="several splits"):
        recipe.split_by_group(
            [candidate(0, "a", "g", "test"), candidate(1, "a", "g")], lambda label: 1
        )


def test_order_of_the_candidates_does_not_matter():
    candidates = [candidate(n, "ab"[n % 2]) for n in range(30)]
    names = [
        [picture.candidate.name for side in chosen(order).values() for picture in side]
        for order in (candidates, candidates[::-1])
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("change", [lambda im: im, PIL.ImageOps.mirror, lambda im: im.point(
    lambda v: v * 0.8 + 20)], ids=["copy", "mirrored", "paler"])  # fmt: skip
def test_near_copies_of_test_pictures_are_left_out_of_training(change):
    first = [candidate(n, "a", "test", "test") for n in range(3)]
    copies = [
        candidate(10 + n, "a", "train", "train", lambda n=n: change(painted(n))) for n in range(3)
    ]
    others = [candidate(20 + n, "a", "train", "train") for n in range(2)]
    sides = chosen(first + copies + others)
    assert {p.candidate.name for p in sides["train"]} == {"c20", "c21"}


def test_likeness_of_other_pictures_and_of_blank_ones_is_low():
    one, other = (recipe.thumbnail(painted(seed)) for seed in (0, 1))
    assert recipe.likeness(one, one[:1]) == pytest.approx(1)
    assert recipe.likeness(one, other[:1]) < 0.5
    blank = recipe.thumbnail(PIL.Image.new("RGB", (9, 9), "white"))
    assert recipe.likeness(blank, one[:1]) == 0


def test_a_missing_part_is_named_and_the_rest_is_kept():
    def absent():
        raise packages.MissingPackage("package 'x' is not installed")

    half = recipe.Recipe("toys", made([]).families, (), (lambda: [candidate(0, "a")], absent), "")
    found, missing = recipe.find(half)
    assert len(found) == 1
    assert missing == ["package 'x' is not installed"]
    nothing = recipe.Recipe("toys", half.families, (), (absent,), "")
    with pytest.raises(packages.MissingPackage, match="'x'"):
        recipe.find(nothing)


def test_squared_pads_and_takes_the_background():
    image = PIL.Image.new("RGBA", (40, 10), (0, 0, 0, 0))
    out = recipe.squared(image)
    assert out.size == (recipe.SIZE, recipe.SIZE)
    assert out.mode == "RGB"
    assert np.asarray(out).min() == 255
    dark = np.asarray(recipe.squared(PIL.Image.new("RGB", (40, 10), "red"), "black"))
    assert dark[0, 0].tolist() == [0, 0, 0]
    assert dark[112, 112].tolist() == [255, 0, 0]
