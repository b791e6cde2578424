"""What a notebook shows of batches, edits, captures and passes."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html.parser
import io

import jax
import numpy as np
import PIL.Image
import pytest

import mllm_jax as mj
from mllm_jax import notebook, sites
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.data import domains
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.interventions import attention_maps, receipts, results, top_tokens
from mllm_jax.passes import generate, run
from tests.helpers import tiny

RECEIPT = receipts.Receipt(
    "ablate <lm>", np.array([0, 4, 4]), np.array([0, 7, 2]), np.array([0.0, 3.0, 4.0])
)


class Reader(html.parser.HTMLParser):
    """Texts, texts with the colour they stand on, and pictures."""

    def __init__(self, shown: str):
        super().__init__()
        self.cells, self.colours, self.pictures, self.titles = [], [], [], []
        self._open = []
        self.feed(shown)
        assert not self._open, "every tag is closed"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            start, code = found["src"].split(",")
            assert start == "data:image/png;base64"
            self.pictures.append(np.array(PIL.Image.open(io.BytesIO(base64.b64decode(code)))))
            self.titles.append(found.get("title"))
            return
        self._open.append((tag, found.get("style", "").partition("background:")[2]))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.cells.append(data)
        if self._open[-1][1]:
            self.colours.append((data, self._open[-1][1]))


class Shown(Reader):
    """What a browser shows; no attribute or tag comes out of a text."""

    def handle_starttag(self, tag, attributes):
        assert {name for name, _ in attributes} <= {"src", "alt", "style", "title"}
        super().handle_starttag(tag, attributes)


def cells(shown: str) -> list[str]:
    return Shown(shown).cells


def test_a_receipt():
    assert str(RECEIPT) == "ablate <lm>: layers 1-2, 4 tokens, 9 elements changed, norm 5"
    assert cells(RECEIPT._repr_html_())[5:] == ["ablate <lm>", "layers 1-2", "4", "9", "5"]


class Processor:
    """Turns tokens into text that must be escaped."""

    def word(self, token):
        return f"<b>{token}</b>"


LENS = results.Lens(
    np.arange(30).reshape(2, 1, 3, 5) % 9,
    np.log(np.full((2, 1, 3, 5), 0.25)),
    np.full((2, 1, 3), 1.5),
)


def test_a_pass():
    logits = np.log(np.array([[0.1, 0.6, 0.3]]))
    out = run.Out(logits, {"<say>": LENS}, (RECEIPT,), processor=Processor())
    shown = cells(out._repr_html_())
    assert shown[5:10] == ["ablate <lm>", "layers 1-2", "4", "9", "5"]
    assert shown[shown.index("likeliest next words") + 2] == (
        "'<b>1</b>' 0.60, '<b>2</b>' 0.30, '<b>0</b>' 0.10"
    )
    assert "<say>" in shown and "row 0, token 2: layer" in shown
    at = shown.index("1.50")
    assert shown[at - 1] == "0" and shown[at + 1].startswith("'<b>1</b>' 0.25, '<b>2</b>' 0.25")
    plain = run.Out(None, {"x": {"a": np.arange(3.0)}}, ())
    row = cells(plain._repr_html_())[-7:]
    assert row == ["['a']", "[3]", "float64", "0", "1", "2", "[0, 1, 2]"]
    assert run.Out(None, {}, ())._repr_html_() == ""


def stats_of(x, kinds):
    """Statistics of values [L, B, T, F], whose tokens are of kinds in turn."""
    parts = [x[:, :, i :: len(kinds)].reshape(len(x), -1, x.shape[-1]) for i in range(len(kinds))]
    sums = {
        "positive": [(p > 0).sum(1) for p in parts], "sum": [p.sum(1) for p in parts],
        "squares": [(p**2).sum(1) for p in parts], "max": [p.max(1) for p in parts],
        "centred": [p.var(1) * p.shape[1] for p in parts],
    }  # fmt: skip
    tokens = np.array([[p.shape[1] for p in parts]] * len(x))
    return results.Stats(
        **{name: np.stack(value, -1) for name, value in sums.items()}, tokens=tokens, kinds=kinds
    )


def test_statistics():
    x = np.full((2, 1, 4, 3), -1.0)
    x[1, 0, :, 2] = 3.0
    shown = cells(stats_of(x, ("image", "question"))._repr_html_())
    at = shown.index("image")
    assert shown[at : at + 5] == ["image", "2", "16.7%", "-0.3333", "3"]
    assert shown[shown.index("most often above zero") + 1 :][:2] == ["[1, 2]", "100.0%"]


def test_entropies_and_masses():
    entropy = results.Entropy(
        np.array([[[4.0, 0.0]], [[1.0, 0.0]]]), np.zeros((2, 1, 2)),
        np.array([[[2, 0]], [[2, 0]]]), ("image", "answer"),
    )  # fmt: skip
    assert cells(entropy._repr_html_())[1:] == ["image", "answer", "0", "2.000", "1", "0.500"]
    empty = [[0.0] * 2] * 2  # a row that fills up the batch
    values = np.array([[[[0.25, 0.5], [0.75, 0.0]], [[np.nan] * 2] * 2, empty]])
    mass = attention_maps.Mass(values, ("tile 0", "tile 1"))
    assert cells(mass._repr_html_())[1:] == ["tile 0", "tile 1", "0", "0.500", "0.250"]


def test_the_strongest_tokens():
    zeros = np.zeros((1, 2, 1), np.int32)
    top = top_tokens.Top(
        np.array([[[2.0], [5.0]]]), zeros + [[3], [8]], zeros + 4, zeros + 1, zeros + 2, zeros - 0,
        np.array(9), "largest",
    )  # fmt: skip
    shown = cells(top._repr_html_())
    assert shown[1] == "largest value"
    assert shown[6:12] == ["[0, 1]", "5", "8", "4", "1", "[2, 0]"]
    odd = dataclasses.replace(top, value=np.array([[[np.nan], [5.0]]]))
    assert cells(odd._repr_html_())[6:9] == ["[0, 0]", "nan", "3"]
    missing = dataclasses.replace(odd, example=zeros + [[-1], [8]])
    assert cells(missing._repr_html_())[6:] == shown[6:12]
    counts = np.array([[[1, 2, 1]]])
    edges, nan = np.array([0.0, 1.0]), np.full(counts.shape[:2], 3)
    odd = cells(top_tokens.Histogram(counts, edges, (), nan)._repr_html_())
    assert odd[-3:-1] == ["not a number", f"{nan.sum()}"]
    shown = cells(top_tokens.Histogram(counts, edges, ())._repr_html_())
    assert shown[3:9] == ["-inf to 0", "1", "25.0%", "0 to 1", "2", "50.0%"]


def test_a_map_of_attention(tiny_config, make_batch):
    batch = make_batch(images=(1,), words=(5,))
    values = np.linspace(0, 1, batch.ids.shape[1])[None, None]
    shown = Shown(attention_maps.AttentionMap(values, batch.tokens, False)._repr_html_())
    assert shown.cells[0].startswith("row 0, tile 0: from 0 to 0.") and len(shown.pictures) == 1
    assert len(np.unique(shown.pictures[0])) == 4


def test_a_generation():
    made = generate.Generation(np.array([[1, 2]]), ["<i>x</i>"], (RECEIPT,), {"say": LENS})
    shown = cells(made._repr_html_())
    assert shown[:4] == ["row", "generated", "0", "<i>x</i>"] and "ablate <lm>" in shown
    assert cells(generate.Generation(np.array([[1, 2]]), None, ())._repr_html_())[3] == "[1, 2]"


def test_a_model_a_site_and_an_address(tiny_model):
    shown = cells(tiny_model._repr_html_())
    assert shown[0] == "Llava" and "vision" in shown and "layers 4" in shown[shown.index("lm") + 3]
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny_model.lm))
    assert shown[shown.index("lm") + 1] == f"{count:,}"
    assert cells(S.lm.mlp.act._repr_html_())[5:8] == [
        "lm.mlp.act", "neurons: silu(gate), before the product with up", "L B T F",
    ]  # fmt: skip
    assert cells(S.lm.mlp.act[3, [7]]._repr_html_())[2] == "lm.mlp.act[3, [7]]"


def test_an_example_and_its_domain():
    picture = io.BytesIO()
    PIL.Image.new("RGB", (400, 100), "red").save(picture, "PNG")
    question = domains.Question("style", "what <is> it?", "a & b", ("a & b", "c"))
    example = domains.Example("<1>", "mine", "'x\" onerror", picture.getvalue(), (question,))
    shown = Shown(example._repr_html_())
    assert shown.pictures[0].shape == (42, notebook.SIDE, 3)
    assert shown.cells[0] == "mine: 'x\" onerror (<1>)"
    assert shown.cells[-4:] == ["style", "what <is> it?", "a & b", "a & b, c"]
    shown = Shown(domains.Domain("mine", "test", [example] * 9)._repr_html_())
    assert shown.cells[0] == "mine, test: 9 pictures" and len(shown.pictures) == notebook.ROWS


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (S.lm.mlp.act[:], "lm.mlp.act"),
        (S.lm.mlp.act[12], "lm.mlp.act[12]"),
        (S.lm.mlp.act[-1, [7, 3]], "lm.mlp.act[-1, [7, 3]]"),
        (S.lm.mlp.act[:, range(9)], "lm.mlp.act[:, [0, 1, 2, 3, 4, 5, ... 9 in all]]"),
        (S.lm.resid_post[18:24], "lm.resid_post[18:24]"),
        (S.lm.resid_post[::2], "lm.resid_post[::2]"),
        (S.lm.resid_post[4:-1:2, 0], "lm.resid_post[4:-1:2, 0]"),
        (S.lm.mlp.act[np.eye(4, dtype=bool)], "lm.mlp.act[4 of a mask]"),
        (S.lm.mlp.act[2, np.arange(4) > 0], "lm.mlp.act[2, 3 of a mask]"),
        (S.lm.embed[[5]], "lm.embed[[5]]"),
    ],
)
def test_an_address_as_it_is_written(address, shown):
    assert notebook.address(sites.Address.of(address)) == shown


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        *((tok.NAMED[name], name) for name in ("image", "text", "every", "last", "cls")),
        (tok.text & ~tok.last, "(text & ~last)"),
        (tok.row(3) | tok.tile(0) | tok.column(2), "((row(3) | tile(0)) | column(2))"),
        (tok.mask(np.array([[True, True, False]])), "2 of a mask"),
    ],
)
def test_a_selector_as_it_is_written(where, shown):
    assert notebook.where(where) == shown


def louder(x, by):
    return x * by


def test_edits():
    edits = (
        mj.ablate(S.lm.mlp.act[3, [7]], where=tok.image)
        >> mj.scale(S.projector.act, 0.5)
        >> mj.add(S.lm.resid_post[1], np.ones((2, 32)))
        >> mj.patch(S.lm.resid_mid[2], [0], [1], where=tok.last)
        >> mj.knockout(S.lm.attn[2:], to=tok.last, on=tok.image)
        >> mj.call(S.vision.mlp.act[0], louder, by=[1.0, 2.0])
        >> mj.per_step(mj.ablate(S.lm.attn.heads[0, 1]), [0.0, 1.0])
    )
    shown = cells(edits._repr_html_())
    assert shown[:4] == ["edit", "site", "where", "how"]
    text = " | ".join(shown[4:])
    assert text == (
        "ablate | lm.mlp.act[3, [7]] | image | scale | projector.act | every | value 0.5 | "
        "add | lm.resid_post[1] | every | value array [2, 32] | "
        "patch | lm.resid_mid[2] | last | rows [0] into [1] | "
        "knockout | lm.attn.mask[2:] | last | on image | "
        "call | vision.mlp.act[0] | every | louder, by [1, 2] | "
        "ablate | lm.attn.heads[0, 1] | every | by step [0, 1]"
    )


def test_a_function_without_a_name():
    made = functools.partial(louder, by=2.0)
    assert cells(mj.call(S.lm.norm, made)._repr_html_())[-1] == "partial"


def test_captures():
    lens = mj.lens(S.lm.resid_post[4:], k=3, where=tok.last)
    assert cells(lens._repr_html_())[4:] == ["lens", "lm.resid_post[4:]", "last", "3 words"]
    fire = mj.stats(S.lm.mlp.act, by=("image", "question"))
    assert cells(fire._repr_html_())[4:] == ["stats", "lm.mlp.act", "every", "by question, image"]
    mass = mj.mass(S.lm.attn.pattern[1], on=tok.image)
    assert cells(mass._repr_html_())[4:] == ["mass", "lm.attn.pattern[1]", "every", "on image"]


def test_a_batch_shows_its_words_by_kind_and_its_pictures(tiny_config):
    picture = tiny.picture(0)
    made = tiny.processor(tiny_config)
    batch = made([picture, picture], ["what is < it ?", "a dog"], answers=["cat", "yes"], length=40)
    shown = Reader(batch._repr_html_())
    colour = dict(zip(tok.KINDS, (notebook.COLOURS[kind] for kind in tok.KINDS), strict=True))
    assert ("cat", colour["answer"]) in shown.colours
    assert ("dog", colour["question"]) in shown.colours
    assert ("user", colour["system"]) in shown.colours
    assert ("↵", colour["system"]) in shown.colours
    tokens = tiny_config.image_tokens
    assert shown.colours.count((f"image 0 x {tokens}", colour["image"])) == 2
    assert (f"image x {2 * tokens}", colour["image"]) in shown.colours  # what the colour means
    first = int(np.flatnonzero(batch.tokens.kind[0] == tok.CODE["image"])[0])
    assert shown.titles == [f"tile 0: tokens {first} to {first + tokens - 1}"] * 2
    side = tiny_config.vision.image_size
    small = picture.convert("RGB").resize((side, side)).resize((notebook.SIDE,) * 2)
    lines = np.diff(np.arange(notebook.SIDE) * tiny_config.token_grid // notebook.SIDE, prepend=0)
    inside = np.ix_(lines == 0, lines == 0)
    np.testing.assert_allclose(shown.pictures[0][inside], np.array(small)[inside], atol=1)
    assert (shown.pictures[0] < np.array(small))[lines > 0].mean() > 0.5


def test_what_no_token_reads_of_a_picture_is_dark():
    config = LlavaNextConfig.tiny()
    white = PIL.Image.new("RGB", (32, 10), "white")  # set into a square: bars above and below
    batch = tiny.processor(config)([white], ["what ?"])
    shown = Reader(batch._repr_html_())
    tiles = np.unique(batch.tokens.tile[batch.tokens.tile >= 0])
    assert len(shown.pictures) == len(tiles) > 1
    n, dark = config.token_grid, 0
    for number, picture in zip(tiles, shown.pictures, strict=True):
        own = batch.tokens.tile[0] == number
        cells = np.zeros((n, n), bool)
        cells[batch.tokens.row[0, own], batch.tokens.column[0, own]] = True
        middle = ((np.arange(n) + 0.5) * notebook.SIDE / n).astype(int)
        assert ((picture[np.ix_(middle, middle)].mean(-1) > 100) >= cells).all()
        assert (picture[np.ix_(middle, middle)][~cells] < 70).all()
        dark += (~cells).sum()
    assert dark
    assert any(name.startswith("newline x ") for name, _ in shown.colours)


def test_a_picture_that_is_no_grid_of_tokens_is_shown_whole():
    config = InstructBlipConfig.tiny()
    batch = tiny.instructblip_processor(config)([tiny.picture(0)], ["what ?"])
    (picture,) = Reader(batch._repr_html_()).pictures
    assert picture.shape == (notebook.SIDE, notebook.SIDE, 3) and picture.std() > 0


def test_a_batch_without_words_or_pictures_shows_numbers(make_batch):
    batch = make_batch(images=(1,) * 6, words=(4,) * 6)
    shown = Reader(batch._repr_html_())
    assert not shown.pictures
    assert str(batch.ids[0, 0]) in shown.cells
    assert "and 2 more rows" in shown.cells
