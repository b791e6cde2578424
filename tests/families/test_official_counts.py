"""MMNeuron's counting on a tiny LLaVA: one example at a time in torch, batched and padded in ours."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax import sites, tokens
from mllm_jax.analysis import domain_neurons, official
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import captures
from mllm_jax.passes import reduce
from tests.helpers import hf, published

SEEDS = (3, 40)  # of the examples of two domains
WORDS = (9, 14, 6, 11)


@pytest.fixture(scope="module")
def pair():
    config = llava.LlavaConfig.of(
        llava.ClipConfig.tiny(), llava.DecoderConfig.tiny(), image_token=95
    )
    theirs = hf.random(hf.transformers.LlavaForConditionalGeneration(hf.llava_config(config)))
    return theirs, hf.transfer(config, theirs)


def test_same_counts_and_same_neurons(pair, make_batch):
    theirs, ours = pair
    asked = {m: captures.stats(sites.get(official.SITES[m]), by=tokens.kind)
             for m in ("lang", "vision", "mmproj")}  # fmt: skip
    found = {}
    for seed in SEEDS:
        batched = make_batch(ours.config, images=(1,) * 4, words=WORDS, seed=seed, length=34)
        alone = []
        for i, words in enumerate(WORDS):  # the same examples one by one, without padding
            T = words + ours.config.image_tokens
            alone.append(
                batched.replace(ids=batched.ids[i : i + 1, :T], pixels=batched.pixels[i : i + 1])
            )
        expected = published.count(theirs, alone)
        total = reduce.reduce(asked, ours, [batched])
        for module, (counts, seen) in expected.items():
            positive, count = total[module].positive.sum(-1), total[module].tokens[0].sum(-1)
            if module == "vision":  # the last layer reaches nothing, and we do not run it
                assert len(counts) == len(positive) + 1
                counts = counts[:-1]
            np.testing.assert_array_equal(positive, counts)
            assert count == seen
            found.setdefault(module, []).append((positive, counts, seen))
    for module, domains in found.items():
        positive, counts, seen = (np.stack(arrays) for arrays in zip(*domains))
        expected, _ = published.select(counts, seen, top=0.1, filter_=0.8, bar_=0.8)
        select = domain_neurons.select(
            positive, seen, top_rate=0.1, filter_rate=0.8, bar_rate=0.8, compat="official"
        )
        found = [[layer.tolist() for layer in layers] for layers in official.lists(select.mask)]
        assert found == expected, module
        assert select.mask.any()
