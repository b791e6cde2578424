"""Path patching of our rows is path patching by hooks on networks of transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.analysis import paths
from mllm_jax.analysis.contrasts import Contrast
from mllm_jax.analysis.paths import Path
from tests.helpers import contrasts, families, hf, hooks, tiny

torch = hf.torch
PROMPTS = ["<image> what is it ?", "is <image> it"]
WORLDS = {
    name: [[tiny.picture(seed + row, 40, 60)] for row in range(2)]
    for name, seed in {"clean": 0, "corrupt": 7}.items()
}
METRIC = jax.tree_util.Partial(contrasts.difference, right=np.array([3, 3]), wrong=np.array([7, 7]))
HEADS, MLP, Q, V, RESID = "lm.attn.heads", "lm.mlp.out", "lm.attn.q", "lm.attn.v", "lm.resid_post"
# Sender, receiver, and what the path may lead through; layer -1 is the last one.
PATHS = [
    ((HEADS, 1, 2), (MLP, -1, None), ()),
    ((HEADS, 0, 1), (Q, 1, 3), (MLP,)),
    ((HEADS, 0, 1), (Q, 1, 3), ()),
    ((MLP, 0, None), (V, 2, 0), ()),
    ((HEADS, 1, 0), (RESID, -1, None), ()),
    ((MLP, 0, None), (HEADS, 2, 1), (HEADS,)),
]
SLOW = pytest.mark.slow
QUICK_FIRST = [
    PATHS[0],
    *(pytest.param(*path, marks=SLOW) for path in PATHS[1:3]),
    *(pytest.param(*path, marks=[SLOW, pytest.mark.long]) for path in PATHS[3:]),
]
LONG = ("gemma3", "qwen3-vl", "paligemma2", "onevision", "idefics3")
NAMES = ["llava", *(pytest.param(name, marks=[SLOW, pytest.mark.long]) for name in LONG)]


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    return families.ALL[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(family):
    return mj.load(family.directory, dtype=jnp.float32)


@pytest.fixture(scope="module")
def batches(loaded):
    return {name: loaded[1](shown, PROMPTS, left=True) for name, shown in WORLDS.items()}


def cells(family, name, unit):
    """The columns of a unit in a tensor of theirs."""
    if unit is None:
        return slice(None)
    width = family.config.lm.head_width
    return slice(unit * width, (unit + 1) * width)


class Brute:
    """Passes of their network that keep or replace tensors at our sites."""

    def __init__(self, family, batches):
        self.family, self.layers = family, family.config.lm.layers
        self.given = {
            world: {n: torch.from_numpy(a) for n, a in family.inputs(batch, WORLDS[world]).items()}
            for world, batch in batches.items()
        }
        self.kept = {world: {} for world in self.given}
        self.logits = {world: self.run(world, {}, self.kept[world]) for world in self.given}

    def run(self, world, replaced, kept):
        """Their last logits, where `replaced` holds tensors by site and layer."""

        def at(place):
            def fn(x):
                kept[place] = x.clone()  # what is computed, before it is replaced
                return replaced[place](x) if place in replaced else x

            return fn

        handles = [
            hooks.change(self.family, name, layer, at((name, layer)))
            for name in (HEADS, MLP, Q, V, RESID)
            for layer in range(self.layers)
        ]
        with hooks.removed(handles), torch.no_grad():
            return self.family.network(**self.given[world]).logits[:, -1].numpy()

    def path(self, sender, receiver, through=()):
        """The metric with the receiver as a pass computes it in which the sender alone changes."""
        (s_name, s_layer, s_unit), (r_name, r_layer, r_unit) = sender, receiver
        sent = self.kept["corrupt"][s_name, s_layer]
        frozen = {
            (name, layer): lambda x, clean=self.kept["clean"][name, layer]: clean
            for name in (HEADS, MLP)
            if name not in through
            for layer in range(self.layers)
        }

        def send(x):
            x = frozen[s_name, s_layer](x).clone() if (s_name, s_layer) in frozen else x.clone()
            at = cells(self.family, s_name, s_unit)
            x[..., at] = sent[..., at]
            return x

        direct = {}
        self.run("clean", frozen | {(s_name, s_layer): send}, direct)

        def receive(x):
            x, at = x.clone(), cells(self.family, r_name, r_unit)
            x[..., at] = direct[r_name, r_layer][..., at]
            return x

        logits = self.run("clean", {(r_name, r_layer): receive}, {})
        clean = self.logits["clean"]
        return (clean[:, 3] - clean[:, 7]) - (logits[:, 3] - logits[:, 7])


def ours(place):
    name, layer, unit = place
    return S.get(name)[layer] if unit is None else S.get(name)[layer, [unit]]


@pytest.fixture(scope="module")
def brute(family, batches):
    return Brute(family, batches)


@pytest.mark.parametrize(("sender", "receiver", "through"), QUICK_FIRST)
def test_paths_are_those_of_hooks(sender, receiver, through, family, loaded, batches, brute):
    contrast = Contrast.of(METRIC, loaded[0], batches["clean"], batches["corrupt"])
    receiver = receiver[0], receiver[1] % family.config.lm.layers, receiver[2]
    want = brute.path(sender, receiver, through)
    path = Path(ours(sender), ours(receiver), through=tuple(map(S.get, through)))
    (got,) = paths.effect(contrast, [path])
    assert np.abs(want).max() > 2e-4
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
