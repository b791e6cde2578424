"""float32 is multiplied in float32 on every chip: every product of every program says so."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import deviation, probe
from mllm_jax.data import features
from mllm_jax.evaluation import zero_shot
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.interventions import binding
from mllm_jax.loading import load
from mllm_jax.models import clip_text
from mllm_jax.numerics import precision
from mllm_jax.passes import clean_pass
from mllm_jax.planning import programs
from mllm_jax.training import fit, losses, parts

CONFIGS = {
    "llava": llava.LlavaConfig.tiny(),
    "llava_next": llava_next.LlavaNextConfig.tiny(),
    "instructblip": instructblip.InstructBlipConfig.tiny(),
}
SIZE = programs.Size(rows=2, words=20, steps=5, lanes=3)
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
WIDTH = CONFIGS["llava"].lm.width


def products(jaxpr):
    """(dtypes, precision) of every product of floats in a program, and in what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            dtypes = tuple(operand.aval.dtype for operand in equation.invars)
            if all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
                yield tuple(map(str, dtypes)), equation.params["precision"]
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def said(fn, *args) -> collections.Counter:
    """How often each kind of product is in fn(*args); args are arrays or shapes."""
    return collections.Counter(products(jax.make_jaxpr(fn)(*args).jaxpr))


def of_study(study: str, dtype, config=CONFIGS["llava"], edits=None) -> collections.Counter:
    """Of the very program that a study runs."""
    network, batch = programs.abstract_model(config, dtype), programs.abstract_batch(config, SIZE)
    program = programs.build(study, network, batch, edits, None, SIZE)
    args = [tree for _, tree in program.args]
    return said(functools.partial(program.fn, **program.static), *args)


def everything(model, batch, gates):
    """A pass with each edit and capture that multiplies, as a user's own function."""
    basis = jnp.ones((WIDTH, 1)) * gates.mean()
    edits = (
        mj.project_out(S.lm.resid_post, basis)
        >> mj.patch(S.lm.resid_pre[1], 0, 1, basis=basis, where=tok.last)
        >> mj.scale(S.lm.mlp.act, gates)
    )
    asked = {
        "lens": mj.lens(S.lm.resid_post, k=2),
        "entropy": mj.lens(S.lm.resid_post, by=tok.kind),
        "mean": mj.mean(S.lm.mlp.act),
        "stats": mj.stats(S.lm.mlp.act, by=tok.kind),
        "mass": mj.mass(S.lm.attn.pattern, on=tok.image),
    }
    out = mj.run(model, batch, edits, asked, logits="all")
    return out.logits.sum() + sum(jnp.sum(x) for x in jax.tree.leaves(out.captures))


def of_everything(fn, dtype):
    config = CONFIGS["llava"]
    network, batch = programs.abstract_model(config, dtype), programs.abstract_batch(config, SIZE)
    gates = jnp.ones((config.lm.layers, config.lm.mlp))
    return said(fn, network, batch, gates)


def of_training(part: str, dtype):
    config = CONFIGS["llava"]
    network, batch = programs.abstract_model(config, dtype), programs.abstract_batch(config, SIZE)
    batch = batch.replace(labels=jax.ShapeDtypeStruct((2, 3), np.int32))
    merge, trained, frozen = parts.partition(network, part)
    recipe = fit.Recipe(part=part)
    step = functools.partial(
        fit.update, merge=merge, recipe=recipe, steps=9, loss=losses.answer_nll, places=()
    )
    state = jax.eval_shape(recipe.optimiser(9).init, trained)
    return said(step, trained, state, frozen, [batch])


def of_clip(dtype):
    text = clip_text.ClipTextConfig(vocab=60, positions=9, width=32, layers=2, heads=4, mlp=40)
    config = clip_text.ClipPairConfig(vision=CONFIGS["llava"].vision, text=text, width=24)
    network = nnx.eval_shape(lambda: clip_text.Clip(config, rngs=nnx.Rngs(0)))
    network = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), network)
    ids = jax.ShapeDtypeStruct((3, 7), np.int32)
    side = config.vision.image_size
    pixels = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)

    def both(network, pixels, ids):
        return zero_shot._logits(network, pixels, zero_shot._texts(network, ids))

    return said(both, network, pixels, ids)


def of_features(dtype):
    config = CONFIGS["llava"]
    network, batch = programs.abstract_model(config, dtype), programs.abstract_batch(config, SIZE)
    return said(features.encode_pictures, network, batch)


def of_clean_pass(dtype):
    """The clean pass of a sweep."""
    config = CONFIGS["llava"]
    network, batch = programs.abstract_model(config, dtype), programs.abstract_batch(config, SIZE)
    state = mj.keep(S.lm.resid_pre)
    bound = binding.bind(network, batch, None, {clean_pass._STATE: state})[1]
    clean = functools.partial(clean_pass._clean, module="lm", prefix=0)
    return said(clean, network, batch, bound, ())


PROGRAMS = {
    **{study: functools.partial(of_study, study) for study in programs.STUDIES},
    **{
        f"run of {name}": functools.partial(of_study, "counts+lens", config=config)
        for name, config in CONFIGS.items()
    },
    "every edit and capture": functools.partial(of_everything, everything),
    "gradient inside jit": functools.partial(
        of_everything, jax.jit(jax.grad(everything, argnums=2))
    ),
    "lora": functools.partial(of_training, "projector+lora"),
    "vision features": of_features,
    "clean pass of a sweep": of_clean_pass,
    "clip": of_clip,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_float32_is_multiplied_in_float32(name):
    found = PROGRAMS[name](jnp.float32)
    assert sum(found.values()) > 3
    assert {how for _, how in found} == {HIGHEST}, found


@pytest.mark.parametrize("name", PROGRAMS)
def test_bfloat16_is_multiplied_as_the_chip_does(name):
    """But what must be float32: statistics, entropies, subspaces."""
    found = PROGRAMS[name](jnp.bfloat16)
    for (a, b), how in found:
        assert (how == HIGHEST) == (a == b == "float32"), found
    narrow = sum(n for ((a, b), _), n in found.items() if a == b == "bfloat16")
    assert narrow > sum(found.values()) / 3


def test_whoever_says_otherwise_is_heard():
    with jax.default_matmul_precision("tensorfloat32"):
        found = of_study("generate", jnp.float32)
    assert {how for _, how in found} == {(jax.lax.Precision.HIGH,) * 2}


def test_probes_and_deviations():
    x, y = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    found = said(probe.logits, [(y, jnp.ones(5)), (y.T, jnp.ones(4))], x)
    found += said(deviation.sums, x, x, jnp.ones((1, 2, 3)))
    assert {how for _, how in found} == {HIGHEST} and sum(found.values()) == 4


def test_a_program_without_the_words_would_be_found():
    x = jnp.ones((2, 2))
    assert said(jax.jit(lambda x: jax.lax.map(lambda row: row @ x, x)), x) == {
        (("float32", "float32"), None): 1
    }


@pytest.mark.parametrize("into_float32", [False, True])
def test_products_are_those_of_numpy(into_float32):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((3, 400), (400, 2)))
    want = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    for got in (
        precision.matmul(x, y, into_float32=into_float32),
        precision.einsum("BD,DV->BV", x, y, into_float32=into_float32),
    ):
        assert got.dtype == (jnp.float32 if into_float32 else jnp.bfloat16)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=1e-5 if into_float32 else 2**-8
        )


@pytest.mark.parametrize("dtype", [None, "float32", np.float16, jnp.bfloat16, np.dtype("float32")])
def test_dtypes_that_parameters_may_have(dtype):
    assert precision.parameter_dtype(dtype) == jnp.dtype(dtype or "float32")


@pytest.mark.parametrize(
    "dtype", ["int8", np.int8, bool, "float8_e4m3fn", "complex64", float, "half precision", [], 3]
)
def test_all_other_dtypes_are_refused_in_a_line(dtype, tmp_path):
    for read in (load.load, load.read_model):
        with pytest.raises(ValueError, match=r"dtype=.* is not one of float32, bfloat16, float16$"):
            read(tmp_path, dtype=dtype)
