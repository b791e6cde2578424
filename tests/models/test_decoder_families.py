"""The decoder is each text model of transformers, at every site."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import sites
from mllm_jax.interventions import captures
from mllm_jax.passes import run
from tests.helpers import hf
from tests.models import text_models as text

pytestmark = pytest.mark.usefixtures("op_by_op")
torch = hf.torch


def assert_equal(ours, batch, want):
    """Within 1e-5 at sites and 1e-4 at logits, relative to values of order 1."""
    wanted = {name: captures.keep(sites.get(name)) for name in want}
    got = run.run(ours, batch, None, wanted, logits="all").captures
    maps = ours.token_maps(batch)
    far = hf.worst(got, want, maps)
    order = {name: max(1, float(np.sqrt(np.square(a).mean()))) for name, a in want.items()}
    bound = {name: 1e-4 if name == "logits" else 1e-5 * order[name] for name in want}
    assert all(far[name] <= bound[name] for name in want), far


def batch_of(make_batch, ours, pad: str = "right"):
    return make_batch(ours.config, images=(0, 0, 0), words=(12, 5, 9), pad=pad, seed=1)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("name", text.MODELS)
def test_every_site(name, pad, make_batch):
    theirs, ours = text.pair(name)
    batch = batch_of(make_batch, ours, pad)
    if ours.config.lm.rope_sections:
        batch = text.with_mrope(batch)
    assert_equal(ours, batch, text.tensors(theirs, **text.inputs(batch, theirs)))


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize(
    "name, kind, ends",
    [
        ("gemma3", "gemma3", ((1, 8), (8, 10))),
        ("gemma2", "paligemma", ((0, 8),)),
        ("gemma", "paligemma", ((0, 8),)),
    ],
)
def test_blocks_that_look_forward(name, kind, ends, pad, make_batch):
    theirs, ours = text.pair(name)
    causal = batch_of(make_batch, ours, pad)
    batch = text.with_blocks(causal, ends)
    want = text.tensors(theirs, **text.inputs(batch, theirs, kind))
    without = text.tensors(theirs, **text.inputs(causal, theirs))
    assert np.abs(want["logits"] - without["logits"])[causal.valid].max() > 0.1
    assert_equal(ours, batch, want)


def test_deepstack(make_batch):
    theirs, ours = text.pair("qwen3-vl")
    batch = text.with_mrope(batch_of(make_batch, ours))
    places = batch.valid & (batch.position % 3 == 1)
    added = np.random.default_rng(0).normal(size=(2, places.sum(), 64)).astype(np.float32)
    want = text.tensors(
        theirs,
        **text.inputs(batch, theirs),
        visual_pos_masks=torch.from_numpy(places),
        deepstack_visual_embeds=list(torch.from_numpy(added)),
    )
    spread = np.zeros((2, *places.shape, 64), np.float32)
    spread[:, places] = added
    seen: dict[str, list] = {}

    class Tap:
        def __call__(self, site, x):
            seen.setdefault(site.name, []).append(np.asarray(x))
            return x

        def idle(self, site, shape):
            return True

        def scan(self, step, layers, x, inputs):
            out = []
            for i in range(ours.config.lm.layers):
                layer, given = jax.tree.map(lambda a: a[i], (layers, inputs))  # noqa: B023
                x, kv = step(layer, x, self, given)
                out.append(kv)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *out)

    x, _ = ours.lm(ours.lm.embeddings(batch.ids), batch.positions, Tap(), None, spread)
    np.testing.assert_allclose(
        ours.lm.logits(x)[batch.valid], want["logits"][batch.valid], atol=1e-4
    )
    for name in ("lm.resid_post", "lm.attn.q", "lm.mlp.act"):
        got = np.stack(seen[name]).reshape(want[name].shape)
        np.testing.assert_allclose(
            got[:, batch.valid], want[name][:, batch.valid], atol=2e-5, err_msg=name
        )


def test_embeddings_of_gemma_in_bfloat16_are_rounded_as_in_transformers():
    theirs, ours = text.pair("gemma3")
    ids = np.arange(96)[None]
    table = theirs.model.embed_tokens
    with torch.no_grad():
        scale = table.embed_scale.to(torch.bfloat16)
        want = torch.nn.functional.embedding(torch.from_numpy(ids), table.weight.bfloat16()) * scale
    lm = jax.tree.map(lambda a: a.astype(jnp.bfloat16), ours.lm)
    got = np.asarray(lm.embeddings(ids).astype(jnp.float32))
    np.testing.assert_array_equal(got, want.float().numpy())


def test_norms_of_gemma_in_bfloat16_are_rounded_once():
    theirs, ours = text.pair("gemma3")
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    norm = theirs.model.norm
    reference = type(norm)(64, eps=norm.eps).bfloat16()
    with torch.no_grad():
        reference.weight.copy_(norm.weight)
        want = reference(torch.from_numpy(x).bfloat16()).float().numpy()
    lm = jax.tree.map(lambda a: a.astype(jnp.bfloat16), ours.lm)
    got = np.asarray(lm.norm(jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2**-8)  # the sum of squares may differ in one ulp
    assert (got == want).mean() > 0.9


def test_padding_is_never_read(make_batch):
    """Tokens of padding change nothing, also where blocks look forward."""
    _, ours = text.pair("gemma3")
    batch = text.with_blocks(batch_of(make_batch, ours, "left"))
    garbled = batch.replace(ids=np.where(batch.valid, batch.ids, 7))
    x = [np.asarray(run.run(ours, b, logits="all").logits)[batch.valid] for b in (batch, garbled)]
    np.testing.assert_array_equal(*x)
