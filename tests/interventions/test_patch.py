"""A patch: row `into` reads row `source`, and no other row changes.

The oracle reads each row alone, with a plain loop over layers and NumPy at the site.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.batch import Batch
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from tests.helpers import oracle, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("op_by_op")]

ELSEWHERE = (S.projector.deepstack,)  # of Qwen3-VL alone
TILES = [s for s in S.TABLE if s.axes[0] == "I" and "S" not in s.axes and s not in ELSEWHERE]
OTHERS = [site for site in S.TABLE if site.axes[0] == "B" and "S" not in site.axes]
CONFIGS = {
    "llava": llava.LlavaConfig.tiny(),
    "next": llava_next.LlavaNextConfig.tiny(),
    "instructblip": instructblip.InstructBlipConfig.tiny(),
}
# Of LLaVA-NeXT a picture's tiles and tokens depend on its size: 3, 3 and 5 tiles.
SIZES = ((24, 48), (48, 24), (40, 48))
PROMPTS = ("what is shown ?", "which one is it")


def small(config):
    """With two layers of vision and of language."""
    fields = {name: dataclasses.replace(getattr(config, name), layers=2) for name in ("lm",)}
    return dataclasses.replace(config, **fields)


@dataclasses.dataclass(frozen=True)
class Case:
    model: llava.Llava
    batch: Batch  # rows A, B, B, A: pictures and prompts are shared
    alone: tuple[Batch, Batch]  # A and B
    clean: tuple  # logits and tensors of these


def pictures_of(row: int, count: int) -> list:
    return [tiny.picture(10 * row + i, *SIZES[i]) for i in range(count)]


@pytest.fixture(scope="module")
def cases(random_model, op_by_op):
    made = {}

    def make(family: str, count: int) -> Case:
        if (family, count) not in made:
            config = small(CONFIGS[family])
            build = tiny.instructblip_processor if family == "instructblip" else tiny.processor
            processor, shown = build(config), [pictures_of(row, count) for row in range(2)]
            rows = (0, 1, 1, 0)
            batch = processor([shown[r] for r in rows], [PROMPTS[r] for r in rows])
            alone = tuple(processor([shown[r]], [PROMPTS[r]]) for r in range(2))
            model = random_model(config)
            clean = tuple(oracle.forward(model, b) for b in alone)
            made[family, count] = Case(model, batch, alone, clean)
        return made[family, count]

    return make


def selected(case: Case, site, row: int) -> np.ndarray:
    """bool[I or B, T] of a row alone: all that is no padding."""
    batch = case.alone[row]
    if site.axes[0] == "B":
        return batch.valid
    return np.asarray(site.entry(case.model.token_maps(batch)).kind) != tok.CODE["pad"]


def patched(case: Case, site, layer: int | None):
    """Logits of B alone, whose selected tokens are, in their order, those of A alone."""
    read, written = (selected(case, site, row) for row in range(2))
    values = case.clean[0][1][site.name][layer or 0][read]

    def change(x):
        y = x.copy()
        y[written] = values
        return y

    return oracle.forward(case.model, case.alone[1], [(site.name, layer, change)])[0], values


def last(batch, logits) -> np.ndarray:
    return np.asarray(logits)[np.arange(len(batch.ids)), batch.last]


def every_pair():
    """All; those of two pictures a row and of some sites are not `long`."""
    sample = {
        S.vision.resid_post, S.projector.out, S.lm.attn.heads, S.logits,
        S.vision.attn_out, S.projector.act, S.lm.mlp.act, S.lm.embed,
    }  # fmt: skip
    for family, count in [(f, n) for f in CONFIGS for n in (1, 2, 3)]:
        sites = [s for s in TILES if s.module != "qformer" or family == "instructblip"]
        if family == "instructblip":  # one linear map has no activation, and CLS no norm before it
            sites = [s for s in sites if s != S.projector.act]
        for site in [*sites, *OTHERS]:
            marks = [pytest.mark.long] if count != 2 or site not in sample else []
            yield pytest.param(family, count, site, id=f"{family}-{count}-{site}", marks=marks)


@pytest.mark.parametrize(("family", "count", "site"), list(every_pair()))
def test_row_into_reads_row_source(family, count, site, cases):
    case = cases(family, count)
    layer = 0 if site.stacked else None
    want, values = patched(case, site, layer)
    address = site if layer is None else site[layer]
    out = mj.run(case.model, case.batch, mj.patch(address, 0, 1), logits="all")
    (_, b), (clean_a, clean_b) = case.alone, (clean for clean, _ in case.clean)
    got = last(case.batch, out.logits)
    np.testing.assert_allclose(got[1], last(b, want)[0], rtol=0, atol=1e-5)
    for row, clean in ((0, clean_a), (2, clean_b), (3, clean_a)):
        np.testing.assert_allclose(got[row], last(b, clean)[0], rtol=0, atol=1e-5)
    if site not in (S.qformer.mlp.act,):
        assert abs(got[1] - got[2]).max() > 1e-3
    (receipt,) = out.receipts
    np.testing.assert_array_equal(receipt.tokens[layer or 0], len(values))
    np.testing.assert_array_equal(np.delete(receipt.tokens, layer or 0), 0)


def test_rows_of_different_pictures_are_matched_by_their_tokens(random_model):
    """Two pictures of two sizes in a row, the other way round in the next."""
    config = small(CONFIGS["next"])
    model, processor = random_model(config), tiny.processor(config)
    wide, high = (tiny.picture(i, *SIZES[i]) for i in range(2))
    batch = processor([[wide, high], [high, wide]], [PROMPTS[0]] * 2)
    asked = {"x": mj.keep(S.projector.out)}
    out = mj.run(model, batch, mj.patch(S.projector.out, 0, 1), asked)
    tiles = len(batch.is_real_tile) // 2
    x = np.asarray(out["x"]).reshape(2, tiles, *np.shape(out["x"])[1:])
    real = batch.is_real_tile.reshape(2, tiles)
    np.testing.assert_array_equal(x[1][real[1]], x[0][real[0]])
    with pytest.raises(ValueError, match="matches 48 tokens of row 0 with 96 of row 1"):
        uneven = processor([[wide], [high, wide]], [PROMPTS[0]] * 2)
        mj.run(model, uneven, mj.patch(S.projector.out, 0, 1))
