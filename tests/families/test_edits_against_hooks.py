"""Edits are what hooks in transformers do: ablate, add, patch and knockout, in every family."""

from __future__ import annotations

import contextlib
import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import keys
from tests.families.test_families import PICTURES, PROMPTS, STEPS, continued
from tests.helpers import families, hf, tiny

torch = hf.torch
SOURCE, INTO = 0, 1  # rows of a patch
UNITS = [1, 5]


@pytest.fixture(scope="module", params=families.ALL)
def family(request, tmp_path_factory):
    return families.ALL[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(family):
    return mj.load(family.directory, dtype=jnp.float32)


@pytest.fixture(scope="module")
def batches(loaded):
    return {
        pad: loaded[1](PICTURES, PROMPTS, left=pad == "left", rows=5) for pad in ("left", "right")
    }


def module_at(family, site, layer: int | None):
    """Their module at a site, and whether the site is its input or its output."""
    text = family.where.get(site.name, site.hf).format(i=layer)
    for path, read in re.findall(r"(\S+) \((\w+)\)", text):
        for name, module in family.network.named_modules():
            spellings = (f"{name}.", keys.canonical_key(f"{name}."))
            if any(re.fullmatch(rf"(vision_tower\.)?{re.escape(path)}\.", s) for s in spellings):
                return module, read
    raise AssertionError(f"no module at {text}")


def hook(family, site, layer, change):
    """Change a tensor of theirs at a site; `change` maps it to another."""
    module, read = module_at(family, site, layer)
    if read == "input":
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))

    def after(_, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return module.register_forward_hook(after)


def hook_mask(family, layer: int, to: np.ndarray, on: np.ndarray):
    """Hide the tokens `on` from the tokens `to`, bool[B, T], in a layer of the language model."""
    hidden = torch.from_numpy(to[:, :, None] & on[:, None, :])[:, None]

    def before(_, args, kwargs):
        mask = kwargs["attention_mask"]
        low = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask.masked_fill(hidden, low)}

    # The mask is an argument of the module that computes the pattern.
    module, _ = module_at(family, S.lm.attn.pattern, layer)
    return module.register_forward_pre_hook(before, with_kwargs=True)


@contextlib.contextmanager
def hooks(*made):
    """Take the hooks away afterwards."""
    try:
        yield
    finally:
        for each in made:
            each.remove()


def where_of(batch, kind: str) -> np.ndarray:
    """bool[B, T]."""
    if kind == "last":
        return np.asarray(batch.tokens.last) & batch.valid
    return batch.tokens.kind == tok.CODE[kind]


def on_tokens(mask, change):
    """A change of the tokens of a mask alone; None for all."""
    if mask is None:
        return change
    mask = torch.from_numpy(mask)[..., None]
    return lambda x: torch.where(mask, change(x), x)


def off(x):
    x = x.clone()
    x[..., UNITS] = 0
    return x


def head_off(width: int):
    def change(x):
        x = x.clone()
        x[..., width : 2 * width] = 0
        return x

    return change


def moved(batch):
    """Row SOURCE's last token in the place of row INTO's."""
    last = np.asarray(batch.last)

    def change(x):
        x = x.clone()
        x[INTO, last[INTO]] = x[SOURCE, last[SOURCE]]
        return x

    return change


def vector(width: int) -> np.ndarray:
    return np.linspace(-2, 2, width, dtype=np.float32)


def cases(family, batch) -> dict[str, tuple]:
    """By name, an edit of ours and the hooks of theirs: four kinds at three sites each."""
    lm, image, last = family.config.lm, where_of(batch, "image"), where_of(batch, "last")
    question, v = where_of(batch, "question"), vector(family.config.lm.width)
    plus = lambda x: x + torch.from_numpy(v)  # noqa: E731
    at = functools.partial(hook, family)

    def ablate(site, layer, change, mask, **where):
        return mj.ablate(site, **where), lambda: [at(site.site, layer, on_tokens(mask, change))]

    def add(site, layer, mask, **where):
        return mj.add(site, v, **where), lambda: [at(_site(site), layer, on_tokens(mask, plus))]

    def patch(site, layer):
        edit = mj.patch(site, source=SOURCE, into=INTO, where=tok.last)
        return edit, lambda: [at(site.site, layer, moved(batch))]

    def cut(layers, queries, keys, **where):
        edit = mj.knockout(S.lm.attn[layers], **where)
        numbers = range(lm.layers)[layers]
        return edit, lambda: [hook_mask(family, n, queries, keys) for n in numbers]

    return {
        "ablate neurons": ablate(S.lm.mlp.act[1, UNITS], 1, off, image, where=tok.image),
        "ablate a head": ablate(
            S.lm.attn.heads[2, [1]], 2, head_off(lm.head_width), last, where=tok.last
        ),
        "ablate vision": ablate(S.vision.mlp.act[0, UNITS], 0, off, None),
        "add to the stream": add(S.lm.resid_post[1], 1, question, where=tok.question),
        "add to attention": add(S.lm.attn_out[2], 2, image, where=tok.image),
        "add to pictures": add(S.projector.out, None, None),
        "patch the stream": patch(S.lm.resid_post[0], 0),
        "patch an MLP": patch(S.lm.mlp.out[1], 1),
        "patch heads": patch(S.lm.attn.heads[2], 2),
        "cut pictures": cut(slice(1, None), last, image, to=tok.last, on=tok.image),
        "cut questions": cut(slice(0, 2), last, question, to=tok.last, on=tok.question),
        "cut within pictures": cut(slice(0, 1), image, image, to=tok.image, on=tok.image),
    }


def _site(target):
    return getattr(target, "site", target)


def their_logits(family, batch) -> np.ndarray:
    given = family.inputs(batch, PICTURES)
    with torch.no_grad():
        return family.network(**{k: torch.from_numpy(v) for k, v in given.items()}).logits.numpy()


def compare(family, loaded, batch, edit, install, clean) -> None:
    with hooks(*install()):
        want = their_logits(family, batch)
    assert np.abs(want - clean)[batch.valid].max() > 1e-3  # the edit does something
    got = np.asarray(mj.run(loaded[0], batch, edit, logits="all").logits)
    np.testing.assert_allclose(got[batch.valid], want[batch.valid], rtol=0, atol=1e-4)


NAMES = (
    "ablate neurons", "ablate a head", "ablate vision", "add to the stream", "add to attention",
    "add to pictures", "patch the stream", "patch an MLP", "patch heads", "cut pictures",
    "cut questions", "cut within pictures",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_edit(name, family, loaded, batches):
    batch = batches["left"]
    clean = their_logits(family, batch)
    edit, install = cases(family, batch)[name]
    compare(family, loaded, batch, edit, install, clean)


def test_edits_of_each_kind_at_once(family, loaded, batches):
    """In this order: on pictures, between attention and MLP, on masks, and from row to row."""
    batch = batches["right"]
    known = cases(family, batch)
    assert set(known) == set(NAMES)
    chosen = ("ablate vision", "add to the stream", "cut pictures", "patch heads")
    edit = functools.reduce(lambda a, b: a >> b, (known[name][0] for name in chosen))
    clean = their_logits(family, batch)
    compare(family, loaded, batch, edit, lambda: [h for n in chosen for h in known[n][1]()], clean)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["left", "right"])
def test_greedy_generation_with_edits(pad, family, loaded, batches):
    """On every token, also on those that are generated."""
    rows, v = len(PROMPTS), 0.5 * vector(family.config.lm.width)
    edit = mj.ablate(S.lm.mlp.act[1, UNITS]) >> mj.add(S.lm.resid_post[0], v)
    given = continued(family.inputs(batches["left"], PICTURES), rows)
    family.network.generation_config.eos_token_id = None

    def theirs():
        with torch.no_grad():
            return family.network.generate(
                **{k: torch.from_numpy(x) for k, x in given.items()},
                max_new_tokens=STEPS, do_sample=False, pad_token_id=0,
            ).numpy()[:, -STEPS:]  # fmt: skip

    clean = theirs()
    with hooks(
        hook(family, S.lm.mlp.act, 1, off),
        hook(family, S.lm.resid_post, 0, lambda x: x + torch.from_numpy(v)),
    ):
        want = theirs()
    assert (want != clean).any()
    got = mj.generate(loaded[0], batches[pad], edit, max_new_tokens=STEPS).tokens
    np.testing.assert_array_equal(np.asarray(got)[:rows], want)


@pytest.mark.slow
def test_a_sweep_that_shares_is_one_that_does_not(family, loaded):
    """Lanes resume among the layers, and after a shared prefix where there is one."""
    model, processor = loaded
    prompts = ["<image> what is it ? a cat or dog or ship or tree star cell page", "<image> is it"]
    batch = processor([tiny.picture(0, 40, 60), tiny.picture(1, 30, 30)], prompts)
    layers = range(family.config.lm.layers)
    stacks = (
        [mj.ablate(S.lm.mlp.act[layer, UNITS], where=tok.last) for layer in layers],
        [mj.scale(S.lm.resid_post[layer], 0.5, where=tok.image) for layer in layers],
    )
    for stacked in map(mj.stack, stacks):
        shared = mj.sweep(_logits, model, batch, stacked)
        alone = mj.sweep(_logits, model, batch, stacked, share=False)
        np.testing.assert_allclose(shared, alone, rtol=0, atol=1e-5)
        assert np.abs(np.asarray(shared[0]) - np.asarray(shared[1])).max() > 1e-3


def _logits(out):
    return out.logits[:, :8]
