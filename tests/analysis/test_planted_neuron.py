"""A neuron that is planted into a model is found again from what the model computes on pictures."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.analysis import stability
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
    seen = np.asarray(model.features(batch, Taps()))
    tokens = np.asarray(projector.fold(seen, model.config.projector.fold))
    towards = tokens[inside].mean((0, 1)) - tokens[~inside].mean((0, 1))
    middle = (tokens[inside].mean((0, 1)) + tokens[~inside].mean((0, 1))) @ towards / 2
    column = {"kernel": towards, "bias": -middle}

    def replace(path, leaf):
        *_, module, name, _ = jax.tree_util.keystr(path).split(".")
        if (module, name) in (("linears[0]", "kernel"), ("linears[0]", "bias")):
            return leaf.at[..., NEURON].set(column[name])
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


@pytest.mark.slow
def test_shuffled_pictures_have_false_neurons_no_more_often_than_the_level(tiny_config):
    level, false = 0.1, 0
    for seed in range(20):
        batch, domain = pictures(tiny_config, seed)
        model = plant(random_model(tiny_config, seed), batch, domain == 0)
        shuffled = np.random.default_rng(seed).permutation(domain)
        found = stability.shuffle_test(
            *counted(model, batch), shuffled, shuffles=19, level=level, **RATES
        )
        false += found.mask.any()
    assert false <= scipy.stats.binom.isf(1e-3, 20, level)
