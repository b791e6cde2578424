"""A neuron that is planted into a model is found again from what the model computes on pictures."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import controls, deviation, intervals, stability
from mllm_jax.interventions.tap import Taps
from mllm_jax.models import projector
from tests.helpers.random_inputs import make_batch, random_model

DOMAINS, EACH, NEURON = 3, 8, 5
RATES = {"top_rate": 0.05, "filter_rate": 0.9, "bar_rate": 0.9}
captures = {"act": mj.keep(S.projector.act)}


def pictures(config, seed: int):
    """Pictures of noise; each domain is a little brighter in a colour of its own."""
    batch = make_batch(config, images=(1,) * DOMAINS * EACH, words=(3,) * DOMAINS * EACH, seed=seed)
    domain = np.repeat(np.arange(DOMAINS), EACH)
    tint = np.eye(DOMAINS, 3, dtype=np.float32)[domain]
    return batch.replace(pixels=batch.pixels + 0.5 * tint[:, None, None]), domain


def plant(model, batch, inside: np.ndarray):
    """The model with one neuron of the projector that fires on the pictures inside, roughly."""
    tokens, towards = towards_inside(model, batch, inside)
    middle = (tokens[inside].mean((0, 1)) + tokens[~inside].mean((0, 1))) @ towards / 2
    return with_neuron(model, towards, -middle)


def towards_inside(model, batch, inside: np.ndarray):
    """What the projector reads of each picture, and the direction to the pictures inside."""
    seen = np.asarray(model.features(batch, Taps()))
    tokens = np.asarray(projector.fold(seen, model.config.projector.fold))
    return tokens, tokens[inside].mean((0, 1)) - tokens[~inside].mean((0, 1))


def with_neuron(model, kernel: np.ndarray, bias: float, strength: float = 1.0):
    """The model with other weights into one neuron of the projector, and those out of it scaled."""

    def replace(path, leaf):
        *_, module, name, _ = jax.tree_util.keystr(path).split(".")
        if module == "linears[0]" and name in ("kernel", "bias"):
            return leaf.at[..., NEURON].set(kernel if name == "kernel" else bias)
        if (module, name) == ("linears[1]", "kernel"):
            return leaf.at[NEURON].multiply(strength)
        return leaf

    return jax.tree_util.tree_map_with_path(replace, model)


def counted(model, batch):
    """int[N, 1, F] tokens on which each neuron is active, and int[N] tokens, by picture."""
    active = np.asarray(mj.run(model, batch, None, captures, logits="none")["act"]) > 0
    active = active.reshape(DOMAINS * EACH, -1, active.shape[-1])
    return active.sum(1)[:, None].astype(int), np.full(len(active), active.shape[1])


@pytest.mark.slow
def test_it_is_found_in_20_of_20_seeds(tiny_config):
    for seed in range(20):
        batch, domain = pictures(tiny_config, seed)
        whose = domain == seed % DOMAINS
        model = plant(random_model(tiny_config, seed), batch, whose)
        found = stability.shuffle_test(*counted(model, batch), domain, shuffles=39, **RATES)
        assert found.p_values[0, NEURON] == 1 / 40, seed
        assert (found.mask[domain, 0, NEURON] == whose).all(), seed


def plant_as_active_as_others(model, batch, inside: np.ndarray, strength: float):
    """The model with one neuron that fires on three of five tokens of the pictures inside.

    What it writes is what it wrote before, times a strength.
    """
    tokens, towards = towards_inside(model, batch, inside)
    return with_neuron(model, towards, -np.quantile(tokens[inside] @ towards, 0.4), strength)


def verdict(model, batch, domain, whose: int) -> float:
    """What the ablation of the neuron moves beyond neurons of like rates: the p-value, signed."""
    inside = domain == whose
    counts, tokens = counted(model, batch)
    rate = (counts[inside].sum(0) / tokens[inside].sum())[None]
    mask = np.zeros(rate.shape, bool)
    mask[0, 0, NEURON] = True
    drawn = controls.rate_matched(mask, rate, draws=10, key=0).mask[:, 0, 0]
    weight = np.asarray(tok.image.mask(batch.tokens))[None]
    last = {"last": mj.keep(S.lm.resid_post[-1])}

    def moved(neurons: np.ndarray) -> np.ndarray:
        edits = mj.ablate(S.projector.act[0, np.flatnonzero(neurons).tolist()])
        edited = mj.run(model, batch, edits, last, logits="none")["last"]
        sums = deviation.sums(np.asarray(clean), np.asarray(edited), weight)
        return (sums.relative_l2[0] / sums.tokens[0])[inside]

    clean = mj.run(model, batch, None, last, logits="none")["last"]
    effect = intervals.effect(moved(mask[0, 0]), np.stack([moved(own) for own in drawn]))
    return float(np.copysign(effect.p, effect.value))


@pytest.mark.slow
def test_a_neuron_that_matters_has_an_effect_and_one_that_only_fires_has_none(tiny_config):
    """In 20 of 20 seeds each; both fire as often as their controls, and one writes nothing."""
    for seed in range(20):
        batch, domain = pictures(tiny_config, seed)
        whose = seed % DOMAINS
        for strength, claimed in ((12.0, True), (0.0, False)):
            model = random_model(tiny_config, seed)
            model = plant_as_active_as_others(model, batch, domain == whose, strength)
            p = verdict(model, batch, domain, whose)
            assert (0 < p <= 0.05) == claimed, (seed, strength, p)


@pytest.mark.slow
@pytest.mark.parametrize("domains", [DOMAINS, 1], ids=["shuffled", "one_split_in_two"])
@pytest.mark.parametrize("seeds", [20, pytest.param(100, marks=pytest.mark.long)])
def test_domains_by_chance_have_neurons_no_more_often_than_the_level(tiny_config, seeds, domains):
    level, false, some = 0.1, 0, 0
    for seed in range(seeds):
        batch, domain = pictures(tiny_config, seed)
        counts, tokens = counted(plant(random_model(tiny_config, seed), batch, domain == 0), batch)
        seen = domain < domains
        by_chance = np.random.default_rng(seed).permutation(np.arange(seen.sum()) % max(2, domains))
        found = stability.shuffle_test(
            counts[seen], tokens[seen], by_chance, shuffles=19, level=level, seed=seed, **RATES
        )
        some += found.selection.selected.any()
        false += found.mask.any()
    assert false <= scipy.stats.binom.isf(1e-3, seeds, level)
    assert some >= seeds / 2  # the selection itself finds neurons in any counts
    print(f"{false} of {seeds} at the level {level}; selected in {some}")
