"""Strings and JSON of edits."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import spec

RAMP = np.arange(32, dtype=np.float32)


def same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(x, y) for x, y in leaves
    )


@pytest.fixture
def root(tmp_path):
    np.save(tmp_path / "v.npy", RAMP)
    (tmp_path / "neurons.json").write_text("[3, 1, 4]")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        ("ablate lm.mlp.act[12,@neurons.json]", mj.ablate(S.lm.mlp.act[12, [3, 1, 4]])),
        (
            "add lm.resid_post[18:24] @v.npy*4 where=text",
            mj.add(S.lm.resid_post[18:24], 4 * RAMP, where=tok.text),
        ),
        ("scale projector.act[0,:] 0.5", mj.scale(S.projector.act[0, :], np.float32(0.5))),
        ("ablate lm.mlp.act[1+5+9]", mj.ablate(S.lm.mlp.act[np.array([1, 5, 9])])),
        (
            "knockout lm.attn[10:] to=last on=image&~row(3)",
            mj.knockout(S.lm.attn[10:], to=tok.last, on=tok.image & ~tok.row(3)),
        ),
        (
            "patch lm.resid_post[20] source=0 into=1 where=question|answer",
            mj.patch(S.lm.resid_post[20], 0, 1, where=tok.question | tok.answer),
        ),
        (
            "ablate lm.attn_out[0] >> replace lm.embed 0 where=image",
            mj.ablate(S.lm.attn_out[0]) >> mj.replace(S.lm.embed, np.float32(0), where=tok.image),
        ),
    ],
)
def test_a_string_is_the_edit_it_says(text, edits, root):
    assert same(spec.parse(text, root), edits)


def test_json_round_trip_is_exact(root):
    text = "add lm.resid_post[18:24] @v.npy*0.1 where=~text >> ablate vision.mlp.act[2]"
    edits = spec.parse(text, root) >> mj.knockout(S.lm.attn[3, [0, 1]], to=tok.last, on=tok.image)
    edits = edits >> mj.patch(S.lm.resid_post, 0, 1, basis=np.ones(32))
    assert same(spec.from_json(json.loads(json.dumps(spec.to_json(edits)))), edits)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("abblate lm.mlp.act", "begins with one of ablate"),
        ("ablate lm.mlp.akt", "nearest: lm.mlp.act"),
        ("add lm.mlp.act", "add takes one value"),
        ("ablate lm.mlp.act 3", "takes no value"),
        ("ablate lm.mlp.act wher=text", "no option 'wher'"),
        ("ablate lm.mlp.act where=imagee", "unknown token kind 'imagee'"),
        ("ablate lm.mlp.act >> add lm.embed @missing.npy", "edit 2"),
    ],
)
def test_what_is_not_understood_is_said(text, says, root):
    with pytest.raises(ValueError, match=says):
        spec.parse(text, root)


def test_code_cannot_be_written():
    with pytest.raises(ValueError, match="is code"):
        spec.to_json(mj.call(S.lm.embed, np.tanh))
