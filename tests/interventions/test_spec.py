"""Strings and JSON of edits and captures say what they say, and come back bit for bit."""

from __future__ import annotations

import inspect
import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import edits as edits_lib
from mllm_jax.interventions import forms, grammar, spec

RAMP = np.arange(32, dtype=np.float32)
GATES = np.array([0, 0.5, 1, 2], np.float32)
KINDS = ("image", "question")


def same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(x, y) for x, y in leaves
    )


@pytest.fixture
def root(tmp_path):
    np.save(tmp_path / "v.npy", RAMP)
    (tmp_path / "neurons.json").write_text("[3, 1, 4]")
    np.save(tmp_path / "pairs.npy", [(0, 5), (1, 6)])
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
        ("ablate lm.mlp.act[(0,5)+(1,6)]", mj.ablate(S.lm.mlp.act[[(0, 5), (1, 6)]])),
        ("ablate lm.mlp.act[(3,-1)]", mj.ablate(S.lm.mlp.act[[(3, -1)]])),
        ("ablate lm.mlp.act[@pairs.npy]", mj.ablate(S.lm.mlp.act[[(0, 5), (1, 6)]])),
        ("ablate lm.mlp.act[0+1,5+6]", mj.ablate(S.lm.mlp.act[np.ix_([0, 1], [5, 6])])),
        ("scale lm.attn.heads[2,1+] 0,0.5,1,2", mj.scale(S.lm.attn.heads[2, [1]], GATES)),
        (
            "knockout lm.attn[10:] to=last on=image&~row(3)",
            mj.knockout(S.lm.attn[10:], to=tok.last, on=tok.image & ~tok.row(3)),
        ),
        (
            "patch lm.resid_post[20] source=0 into=1 where=question|answer",
            mj.patch(S.lm.resid_post[20], 0, 1, where=tok.question | tok.answer),
        ),
        (
            "patch lm.resid_mid source=0+2 into=1+3 basis=@v.npy",
            mj.patch(S.lm.resid_mid, [0, 2], [1, 3], basis=RAMP),
        ),
        (
            "add lm.embed 1 where=answer steps=0,0.5,1,2 >> ablate lm.norm",
            mj.per_step(mj.add(S.lm.embed, np.float32(1), where=tok.answer), GATES)
            >> mj.ablate(S.lm.norm),
        ),
        (
            "ablate lm.attn_out[0] >> replace lm.embed 0 where=image",
            mj.ablate(S.lm.attn_out[0]) >> mj.replace(S.lm.embed, np.float32(0), where=tok.image),
        ),
    ],
)
def test_a_string_is_the_edit_it_says(text, edits, root):
    assert same(spec.parse(text, root), edits)


@pytest.mark.parametrize(
    ("text", "captures"),
    [
        (
            "fire=stats lm.mlp.act by=kind; lens = lens lm.resid_post[1:] k=5 where=image",
            {
                "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
                "lens": mj.lens(S.lm.resid_post[1:], k=5, where=tok.image),
            },
        ),
        ("e=lens lm.resid_post by=image,question", {"e": mj.lens(S.lm.resid_post, by=KINDS)}),
        (
            "a=mass lm.attn.pattern[3,0+2] on=image where=last;b=keep lm.embed;c=mean logits",
            {
                "a": mj.mass(S.lm.attn.pattern[3, [0, 2]], on=tok.image, where=tok.last),
                "b": mj.keep(S.lm.embed),
                "c": mj.mean(S.logits),
            },
        ),
        (
            "a=mass lm.attn.pattern by=tile where=last heads=mean; b=attention lm.attn.pattern; "
            "c=attention_map lm.attn.pattern to=answer on=tile(0) heads=mean;"
            "d=rollout vision.attn.pattern[-1] to=cls",
            {
                "a": mj.mass(S.lm.attn.pattern, by=tok.tile, where=tok.last, heads="mean"),
                "b": mj.attention(S.lm.attn.pattern),
                "c": mj.attention_map(
                    S.lm.attn.pattern, to=tok.answer, on=tok.tile(0), heads="mean"
                ),
                "d": mj.rollout(S.vision.attn.pattern[-1], to=tok.cls),
            },
        ),
    ],
)
def test_a_string_is_the_captures_it_says(text, captures, root):
    found = spec.parse_captures(text, root)
    assert list(found) == list(captures) and same(found, captures)


def came_back(asked) -> bool:
    """Through JSON text, with the same digest."""
    again = spec.from_json(json.loads(json.dumps(spec.to_json(asked))))
    return same(again, asked) and spec.digest(again) == spec.digest(asked)


# Strings with what they mean, drawn together.

FILES = {
    "v.npy": RAMP,
    "mask.npy": np.arange(4 * 48).reshape(4, 48) % 3 == 0,
    "tokens.npy": np.arange(30).reshape(2, 15) % 4 == 0,
    "basis.npy": np.eye(32, 2, dtype=np.float64),
}
INDICES = {
    ":": slice(None), "2": 2, "-1": -1, "1:3": slice(1, 3), "::2": slice(None, None, 2),
    "0+3": np.array([0, 3]), "1+": np.array([1]), "@neurons.json": np.array([3, 1, 4]),
}  # fmt: skip
VALUES = {
    "0": np.float32(0), "-2.5": np.float32(-2.5), "0,0.5,1,2": GATES, "@v.npy": RAMP,
    "@v.npy*0.1": RAMP * np.float32(0.1),
}  # fmt: skip
BASES = {"@v.npy": RAMP, "@basis.npy": np.eye(32, 2, dtype=np.float32)}
WHERES = tok.NAMED | {
    "row(3)": tok.row(3), "column(0)": tok.column(0), "tile(1)": tok.tile(1),
    "~last": ~tok.last, "image&~row(0)": tok.image & ~tok.row(0),
    "text|@tokens.npy&image": tok.text | tok.mask(FILES["tokens.npy"]) & tok.image,
}  # fmt: skip
KINDS_ = {"kind": tok.kind, "image,question": KINDS, "system": ("system",)}
TAKES = {  # what each option of each kind may be
    "where": WHERES, "to": WHERES, "on": WHERES, "basis": BASES, "steps": {"0,0.5,1,2": GATES},
    "source": {"0": 0, "1+3": [1, 3]}, "into": {"2": 2, "0+2": [0, 2]}, "by": KINDS_,
    "k": {"1": 1, "7": 7}, "edges": {"-1,0,0.5": [-1, 0, 0.5]},
    "heads": {"each": "each", "mean": "mean"},
}  # fmt: skip
NEEDED = {"source", "into"}


@st.composite
def addresses(draw, kind):
    """(string, address) of a site that the kind can be of."""
    if kind == "knockout":
        text, site = "lm.attn", S.lm.attn
    elif kind in ("mass", "attention", "attention_map", "rollout"):
        text, site = "lm.attn.pattern", S.lm.attn.pattern
    else:
        able = [s for s in S.TABLE if "S" not in s.axes]
        if kind in grammar.CAPTURES:  # the kinds of `by` are of the LM
            able = [s for s in able if s.module in ("lm", "logits")]
        if kind in ("lens", "distribution"):
            able = [s for s in able if s.axes[-1] == "D" and s != S.lm.norm]
        if kind in ("top", "bottom", "sample", "histogram"):
            able = [s for s in able if len(s.axes) == 3]
        site = draw(st.sampled_from(able))
        text = site.name
    once = isinstance(site, S.Site) and not site.stacked
    forms = ["whole", "layers", "both", "mask"]
    if kind in ("lens", "distribution"):  # of all units
        forms = ["whole"] if once else ["whole", "layers"]
    form = draw(st.sampled_from(forms[:2] if once else forms))
    a, b = (draw(st.sampled_from(list(INDICES))) for _ in range(2))
    if form == "whole":
        return text, site
    if form == "mask":
        return f"{text}[@mask.npy]", site[FILES["mask.npy"]]
    if form == "layers":
        return f"{text}[{a}]", site[INDICES[a]]
    return f"{text}[{a}, {b}]".replace(", ", ","), site[INDICES[a], INDICES[b]]


@st.composite
def said(draw, kind, options, value=None):
    """(string, what it means) of one edit or capture."""
    text, target = draw(addresses(kind))
    words, given = [kind, text], {}
    if value is not None:
        choices = BASES if kind == "project_out" else VALUES
        word = draw(st.sampled_from(list(choices)))
        words, given[value] = [*words, word], choices[word]
    for option in options:
        if option in NEEDED or (kind, option) == ("mass", "on") or draw(st.booleans()):
            word = draw(st.sampled_from(list(TAKES[option])))
            words, given[option] = [*words, f"{option}={word}"], TAKES[option][word]
    steps = given.pop("steps", None)
    made = getattr(mj, kind)(target, **given)
    return " ".join(words), made if steps is None else mj.per_step(made, steps)


FEW = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, array in FILES.items():
        np.save(folder / name, array)
    (folder / "neurons.json").write_text("[3, 1, 4]")
    return folder


@pytest.mark.parametrize("kind", grammar.EDITS)
@FEW
@given(data=st.data())
def test_every_kind_of_edit_comes_back(kind, data, files):
    first = data.draw(said(kind, grammar.EDITS[kind].options, grammar.EDITS[kind].value))
    other = data.draw(st.sampled_from(list(grammar.EDITS)))
    second = data.draw(said(other, grammar.EDITS[other].options, grammar.EDITS[other].value))
    found = spec.parse(f"{first[0]} >> {second[0]}", files)
    assert same(found, first[1] >> second[1])
    assert came_back(found)


@pytest.mark.parametrize("form", grammar.CAPTURES)
@FEW
@given(data=st.data())
def test_every_form_of_capture_comes_back(form, data, files):
    first = data.draw(said(form, grammar.CAPTURES[form].options))
    second = data.draw(said("keep", grammar.CAPTURES["keep"].options))
    found = spec.parse_captures(f"one={first[0]}; two = {second[0]}", files)
    assert same(found, {"one": first[1], "two": second[1]})
    assert came_back(found)


@pytest.mark.parametrize(
    "other",
    [
        mj.scale(S.lm.mlp.act[2], 2.0), mj.add(S.lm.mlp.act[1], 2.0), mj.scale(S.lm.mlp.act[1], 3.0),
        mj.scale(S.lm.mlp.act[[1]], 2.0), mj.scale(S.lm.mlp.act[1], 2.0, where=tok.image),
        mj.per_step(mj.scale(S.lm.mlp.act[1], 2.0), [1.0]),
    ],
)  # fmt: skip
def test_other_edits_have_another_digest(other):
    edits = mj.scale(S.lm.mlp.act[1], 2.0)
    assert spec.digest(edits) == spec.digest(mj.scale(S.lm.mlp.act[1], 2.0)) != spec.digest(other)


def test_whatever_dtype_an_array_has_it_comes_back():
    for dtype in ("float16", "bfloat16", "float32"):
        assert came_back(mj.ablate(S.lm.mlp.act[[(0, 5), (1, 6)]]))
        assert came_back(mj.add(S.lm.embed, jax.numpy.ones(32, jax.numpy.dtype(dtype))))
    assert came_back(mj.add(S.lm.embed, np.linspace(0, 1, 32)[::2]))


def test_text_expresses_every_kind_and_form_that_users_have():
    made = {name: kind.build for name, kind in edits_lib.KINDS.items()}
    read = {name: form.build for name, form in forms.FORMS.items() if form.build}
    assert set(grammar.EDITS) == set(made) - {"call", "splice"}
    assert set(grammar.CAPTURES) == set(read)
    for name, words in (grammar.EDITS | grammar.CAPTURES).items():
        parameters = list(inspect.signature((made | read)[name]).parameters.values())[1:]
        written = {*words.options, words.value} - {None, "steps"}
        assert written == {parameter.name for parameter in parameters}
        needed = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        assert {*words.required, words.value} - {None} == needed
        has_steps = name in made and edits_lib.KINDS[name].has_strength
        assert ("steps" in words.options) == has_steps


def test_the_tables_of_the_page_are_those_of_the_grammar():
    known = grammar.EDITS | grammar.CAPTURES
    documented = {}
    for row in re.findall(r"^\|(.*)\|$", spec.__doc__, re.M):
        names, *_, options = row.split("|")
        written = re.sub(r"\([^)]*\)", "", options)  # without the values of an option
        documented |= {name: set(re.findall(r"\w+", written)) for name in re.findall(r"\w+", names)}
    assert {name: set(words.options) for name, words in known.items()} == {
        name: options for name, options in documented.items() if name in known
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stats lm.mlp.act", "begins with its name: fire=stats lm.mlp.act, not 'stats lm.mlp.act'"),
        ("a=stat lm.mlp.act", "capture 'a=stat lm.mlp.act': a capture begins with one of keep"),
        ("a=keep lm.mlp.akt", "nearest: lm.mlp.act"),
        ("a=keep lm.embed 3", "keep takes no value, got 3"),
        ("a=keep lm.embed; a=keep lm.norm", "there is already a capture 'a'"),
        (
            "a=lens lm.resid_post k=five",
            "capture 'a=lens lm.resid_post k=five': k=five is not a whole number from 1",
        ),
        ("a=mean lm.embed by=kind", "mean has no option 'by'; it has: where"),
        ("a=lens lm.mlp.act", r"a lens reads tensors of the LM's width D; lm.mlp.act is \[B T F\]"),
        ("a=lens lm.resid_post[1,2]", "a lens reads all units of lm.resid_post"),
        ("a=lens lm.resid_post[(1,2)]", "a lens reads all units of lm.resid_post"),
        ("a=lens lm.norm", "read logits"),
        ("a=lens lm.embed k=0", "k=0 is not a whole number from 1"),
        ("a=top lm.mlp.act k=0", "k=0 is not a whole number from 1"),
        ("a=stats lm.mlp.act by=imagee", "unknown token kind 'imagee'"),
        ("a=stats lm.attn.mask", "stats does not read lm.attn.mask"),
        ("a=mass lm.mlp.act on=image", "mass does not read lm.mlp.act"),
        ("a=mass lm.attn.pattern", "mass needs the option on="),
        ("a=stats lm.mlp.act by=tile", "by=tile: kinds of lm tokens are"),
        ("a=attention lm.attn.pattern heads=some", 'heads="some" is neither "each" nor "mean"'),
        ("a=rollout qformer.cross.pattern", "use attention_map"),
    ],
)
def test_captures_that_are_not_understood_are_said(text, says, root):
    with pytest.raises(ValueError, match=says):
        spec.parse_captures(text, root)


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
        ("ablate lm.mlp.act >> add lm.embed @missing.npy", "there is no file .*missing.npy"),
        ("ablate lm.mlp.act[@v.txt]", "'v.txt' is neither .npy nor .json"),
        ("ablate lm.mlp.act[12", r"'lm.mlp.act\[12' is not a site with an address"),
        ("ablate lm.mlp.act[a]", r"edit 1, 'ablate lm.mlp.act\[a\]': invalid literal"),
        ("scale lm.mlp.act two", "could not convert string to float: 'two'"),
        ("patch lm.embed source=0", "patch needs the option into="),
        ("patch lm.embed", "patch needs the option source= and into="),
        ("ablate lm.embed where=text where=image", "the option 'where' is given twice"),
        ("ablate lm.embed where=row(x)", r"unknown token kind 'row\(x\)'"),
        ("ablate lm.embed where=~text|imagee", "unknown token kind 'imagee'"),
        ("ablate lm.norm[1,2]", r"lm.norm exists once, not per layer: its address is \[neurons\]"),
        ("ablate lm.norm[(1,2)]", "lm.norm exists once, not per layer"),
        ("ablate lm.mlp.act[1,2,3]", r"an address is lm.mlp.act\[layers, neurons\], got 3 parts"),
        ("ablate lm.mlp.act[5:1:0]", "'5:1:0' is not a slice start:stop:step"),
        ("ablate lm.mlp.act[1:2:3:4]", "'1:2:3:4' is not a slice"),
        ("knockout lm.mlp.act", "knockout does not apply to lm.mlp.act: only lm.attn"),
        ("ablate lm.attn", "ablate does not apply to lm.attn.mask"),
        ("patch lm.attn.pattern source=0 into=1", "the keys of two rows do not correspond"),
        ("", "an edit begins with one of"),
        ("ablate", "'' is not a site with an address"),
        ("knockout lm.attn steps=1,2", "knockout has no option 'steps'; it has: to, on"),
    ],
)
def test_what_is_not_understood_is_said(text, says, root):
    with pytest.raises(ValueError, match=says):
        spec.parse(text, root)


def test_code_cannot_be_written():
    with pytest.raises(ValueError, match="is code"):
        spec.to_json(mj.call(S.lm.embed, np.tanh))
