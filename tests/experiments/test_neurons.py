"""The parts of the main study, by themselves."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments.domain_neurons import ablation, context, counts
from mllm_jax.families.llava_next import model as llava_next
from tests.helpers import tiny

RNG = np.random.default_rng(0)


def counted(groups):
    """What `counts.count` gives of one domain: the LM has three kinds of token, the tower two."""
    found = {}
    for module, kinds in {
        "lm": ("system", "question", "image"),
        "vision": ("cls", "image"),
    }.items():
        shape = (groups, 2, 5, len(kinds))
        found |= {
            f"{module}/{f}": RNG.integers(0, 9, shape) for f in ("positive", "sum", "centred")
        }
        found[f"{module}/tokens"] = RNG.integers(10, 20, (groups, len(kinds)))
        found[f"{module}/kinds"] = np.array(kinds)
    return found


def test_counts_of_a_scope():
    found = {"a": counted(3), "b": counted(2)}
    text = counts.Counts.of(found, "lm", "text")
    assert text.domain.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(text.positive[3:], found["b"]["lm/positive"][..., :2].sum(-1))
    np.testing.assert_array_equal(text.tokens[:3], found["a"]["lm/tokens"][:, :2].sum(-1))
    image = counts.Counts.of(found, "vision", "image")
    np.testing.assert_array_equal(image.tokens[:3], found["a"]["vision/tokens"][:, 1])
    for module, scope in (("vision", "text"), ("lm", "all")):  # no such token: all of them
        every = counts.Counts.of(found, module, scope)
        np.testing.assert_array_equal(every.tokens[:3], found["a"][f"{module}/tokens"].sum(-1))


def test_deviations_of_groups_and_kinds_are_pooled():
    """Against the activations themselves, of a large mean; a group has no token of one kind."""
    tokens = np.array([[3, 5], [4, 0]])
    activations = [
        [RNG.normal(1e4 + 10 * kind, 1 + group, (2, 5, count)) for kind, count in enumerate(row)]
        for group, row in enumerate(tokens)
    ]

    def stack(reduce):
        return np.moveaxis([[reduce(values) for values in row] for row in activations], 1, -1)

    sums = stack(lambda values: values.sum(-1))
    centred = stack(
        lambda values: (
            ((values - values.mean(-1, keepdims=True)) ** 2).sum(-1)
            if values.size
            else np.zeros((2, 5))
        )
    )
    every = np.concatenate([values for row in activations for values in row], axis=-1)
    want = ((every - every.mean(-1, keepdims=True)) ** 2).sum(-1)
    np.testing.assert_allclose(counts.pool_centred(sums, centred, tokens), want, rtol=1e-9)
    found = {
        "a": {
            "lm/positive": np.zeros((2, 2, 5, 2)), "lm/sum": sums, "lm/centred": centred,
            "lm/tokens": tokens, "lm/kinds": np.array(["image", "question"]),
        }
    }  # fmt: skip
    np.testing.assert_allclose(counts.Counts.of(found, "lm", "all").centred, want[None], rtol=1e-9)
    image = np.concatenate([row[0] for row in activations], axis=-1)
    want = ((image - image.mean(-1, keepdims=True)) ** 2).sum(-1)
    np.testing.assert_allclose(counts.Counts.of(found, "lm", "image").centred[0], want, rtol=1e-9)


@pytest.mark.parametrize(
    ("pictures", "batch_size", "rows"),
    [((16, 16), 8, 2), ((120, 90), 8, 8), ((16, 5), 8, 1), ((10_001,), 4, 4), ((40,), 4, 4)],
)
def test_the_smallest_domain_has_its_groups_whatever_the_batch(pictures, batch_size, rows):
    config = types.SimpleNamespace(groups=8, batch_size=batch_size)
    sizes = dict(enumerate(pictures))
    this = types.SimpleNamespace(
        names=tuple(sizes), config=config, _pairs=lambda half, name: range(sizes[name])
    )
    found = context.Study.count_batch_size.func(this)
    assert found == rows
    assert min(pictures) / found >= min(8, min(pictures))


LLAVA, BLIP = ("vision", "projector", "lm"), ("vision", "qformer", "query", "lm")


@pytest.mark.parametrize(
    "shapes, compat, module, cut",
    [
        (LLAVA, "", "all", LLAVA),
        (LLAVA, "", "projector", ("projector",)),
        (BLIP, "", "qformer+query", ("qformer", "query")),
        (LLAVA, "official", "projector", ()),
        (LLAVA, "official", "vision", ("vision", "projector")),
        (LLAVA, "official", "all", ("vision", "projector", "lm")),
        (BLIP, "official", "vision", ("vision",)),
        (BLIP, "official", "vision+qformer", ("vision", "qformer", "query")),
    ],
)
def test_what_is_cut(shapes, compat, module, cut):
    config = types.SimpleNamespace(compat=compat)
    this = types.SimpleNamespace(config=config, shapes=dict.fromkeys(shapes))
    assert ablation.ablated_modules(this, module) == cut
    with pytest.raises(ValueError, match="no neurons in 'mmproj'; it has vision"):
        ablation.ablated_modules(this, "mmproj")


def test_tokens_of_the_parts_lie_as_the_picture_does():
    config = llava_next.LlavaNextConfig.tiny()
    processor = tiny.processor(config)
    batch = processor([tiny.picture(0, 24, 48)], ["what is shown ?"])
    whole, parts = config.layout((24, 48)).grids(batch.tokens)
    assert whole.shape == (4, 4) and parts.shape == (4, 8)
    assert (np.diff(batch.image_token_index[0, whole].ravel()) == 1).all()
    tile, column = (getattr(batch.tokens, name)[0, parts] for name in ("tile", "column"))
    assert tile.tolist() == [[1] * 4 + [2] * 4] * 4 and column.tolist() == [[0, 1, 2, 3] * 2] * 4
    plain = tiny.processor(llava_next.LlavaConfig.tiny())
    whole, parts = plain.layout(None).grids(plain([tiny.picture(0)], ["what ?"]).tokens)
    assert whole.shape == (2, 2) and parts.size == 0
