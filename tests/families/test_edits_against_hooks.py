"""What our edits do to models of each family is what hooks do to those of transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from tests.families.test_families import PICTURES, PROMPTS, continued
from tests.helpers import families, hf, hooks, tiers

torch = hf.torch
MAKERS = families.ALL | {name: families.VARIANTS[name] for name in ("pixtral", "smolvlm")}
NAMES = tiers.slow_except(["qwen2.5-vl"], MAKERS)
STEPS = 32
VECTOR = np.linspace(-2, 2, 32, dtype=np.float32)


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    family = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    if family.config.lm.width != len(VECTOR):
        pytest.fail("the vector is for models of width 32")
    return family


@pytest.fixture(scope="module")
def loaded(family):
    return mj.load(family.directory, dtype=jnp.float32)


@pytest.fixture(scope="module")
def batch(loaded):
    return loaded[1](PICTURES, PROMPTS, left=True)


def masks(batch):
    """The tokens of each kind, bool[B, T, 1]."""
    kind = batch.tokens.kind[..., None]
    image, question = (torch.from_numpy(kind == tok.CODE[name]) for name in ("image", "question"))
    return image, question, torch.from_numpy(batch.tokens.last[..., None])


def ablate(family, batch):
    image, question, _ = masks(batch)
    units = torch.zeros(family.config.lm.mlp, dtype=bool)
    units[[3, 9, 20]] = True
    head = torch.arange(family.config.lm.heads * family.config.lm.head_width)
    head = head // family.config.lm.head_width == 1
    edits = (
        mj.ablate(S.lm.mlp.act[1, [3, 9, 20]], where=tok.image)
        >> mj.ablate(S.lm.attn.heads[2, [1]])
        >> mj.ablate(S.lm.mlp.out[0], where=tok.question)
    )
    return edits, [
        hooks.change(family, "lm.mlp.act", 1, lambda x: torch.where(image & units, 0.0, x)),
        hooks.change(family, "lm.attn.heads", 2, lambda x: torch.where(head, 0.0, x)),
        hooks.change(family, "lm.mlp.out", 0, lambda x: torch.where(question, 0.0, x)),
    ]


def add(family, batch):
    image, question, _ = masks(batch)
    vector = torch.from_numpy(VECTOR)
    edits = (
        mj.add(S.projector.out, VECTOR)
        >> mj.add(S.lm.resid_post[1], 2 * VECTOR, where=tok.question)
        >> mj.add(S.lm.attn_out[2], VECTOR, where=tok.image)
    )
    return edits, [
        hooks.change(family, "projector.out", 0, lambda x: x + vector),
        hooks.change(family, "lm.resid_post", 1, lambda x: x + 2 * vector * question),
        hooks.change(family, "lm.attn_out", 2, lambda x: x + vector * image),
    ]


def patch(family, batch):
    last = batch.tokens.last.argmax(1).tolist()

    def copied(x):
        x = x.clone()
        x[1, last[1]] = x[0, last[0]]
        return x

    names = "lm.resid_post", "lm.mlp.act", "lm.attn_out"
    parts = [
        mj.patch(S.get(name)[layer], source=0, into=1, where=tok.last)
        for layer, name in enumerate(names)
    ]
    handles = [hooks.change(family, name, layer, copied) for layer, name in enumerate(names)]
    return parts[0] >> parts[1] >> parts[2], handles


def knockout(family, batch):
    image, question, last = (mask[..., 0].numpy() for mask in masks(batch))
    every = range(family.config.lm.heads)
    edits = (
        mj.knockout(S.lm.attn[0], to=tok.last, on=tok.image)
        >> mj.knockout(S.lm.attn[1], to=tok.question, on=tok.image)
        >> mj.knockout(S.lm.attn[2, [1]], to=tok.question, on=tok.system)
    )
    kind = batch.tokens.kind
    system = kind == tok.CODE["system"]
    return edits, [
        hooks.hide(family, 0, every, last[:, :, None] & image[:, None]),
        hooks.hide(family, 1, every, question[:, :, None] & image[:, None]),
        hooks.hide(family, 2, [1], question[:, :, None] & system[:, None]),
    ]


def given(family, batch):
    return {name: torch.from_numpy(a) for name, a in family.inputs(batch, PICTURES).items()}


@pytest.mark.parametrize("kind", [ablate, add, patch, knockout])
def test_an_edit_at_three_sites(kind, family, loaded, batch):
    edits, handles = kind(family, batch)
    with hooks.removed(handles), torch.no_grad():
        want = family.network(**given(family, batch)).logits.numpy()
    with torch.no_grad():
        clean = family.network(**given(family, batch)).logits.numpy()
    out = mj.run(loaded[0], batch, edits, logits="all")
    real = batch.valid
    np.testing.assert_allclose(np.asarray(out.logits)[real], want[real], rtol=0, atol=1e-4)
    assert np.abs(want - clean)[real].max() > 1e-2
    assert all(np.asarray(receipt.tokens).sum() > 0 for receipt in out.receipts)


def test_greedy_generation_with_an_edit(family, loaded, batch):
    units = torch.zeros(family.config.lm.mlp, dtype=bool)
    units[:16] = True
    edit = mj.ablate(S.lm.mlp.act[1, :16]) >> mj.add(S.lm.resid_post[0], VECTOR)
    vector = torch.from_numpy(VECTOR)
    theirs = continued(family.inputs(batch, PICTURES), len(PROMPTS))
    theirs = {name: torch.from_numpy(array) for name, array in theirs.items()}
    family.network.generation_config.eos_token_id = None
    how = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    handles = [
        hooks.change(family, "lm.mlp.act", 1, lambda x: torch.where(units, 0.0, x)),
        hooks.change(family, "lm.resid_post", 0, lambda x: x + vector),
    ]
    with torch.no_grad():
        with hooks.removed(handles):
            want = family.network.generate(**theirs, **how).numpy()[:, -STEPS:]
        clean = family.network.generate(**theirs, **how).numpy()[:, -STEPS:]
    got = mj.generate(loaded[0], batch, edit, max_new_tokens=STEPS).tokens
    np.testing.assert_array_equal(np.asarray(got), want)
    assert (want != clean).any()


@pytest.mark.slow
def test_a_sweep_is_its_runs(loaded, batch):
    """With a clean pass and a prefix that the lanes share."""
    model = loaded[0]
    edits = [
        mj.ablate(S.lm.mlp.act[layer, units], where=tok.last)
        for layer, units in ((0, [1, 2]), (2, [5, 6]), (2, [30, 31]))
    ]
    swept = mj.sweep(_logits, model, batch, mj.stack(edits))
    want = [mj.run(model, batch, edit).logits for edit in edits]
    np.testing.assert_allclose(swept, np.stack(want), rtol=0, atol=1e-5)


def _logits(out):
    return out.logits
