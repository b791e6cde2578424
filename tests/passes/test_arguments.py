"""What is no model, batch, edit or capture is refused by every pass, before anything is computed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax.training import fit
from tests.helpers import tiny

EDIT, KEEP = mj.ablate(S.lm.mlp.act[1]), {"x": mj.keep(S.lm.mlp.act[1])}
STATS = {"x": mj.stats(S.lm.mlp.act)}


def metric(out):
    return out.logits


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """Every pass, as a function of (model, batch, edits, captures)."""
    path = tmp_path_factory.mktemp("never")
    return {
        "run": mj.run,
        "generate": mj.generate,
        "score": lambda m, b, e, c: mj.score(m, b, ["a cat"], e),
        "sweep": lambda m, b, e, c: mj.sweep(metric, m, b, [EDIT if e is None else e], c),
        "reduce": lambda m, b, e, c: mj.reduce(c or STATS, m, [b], e),
        "collect": lambda m, b, e, c: mj.collect(c or KEEP, m, [b], path / "x", e),
    }


PASSES = ("run", "generate", "score", "sweep", "reduce", "collect")


def refused(work, *says) -> None:
    with pytest.raises(ValueError) as caught:
        work()
    message = str(caught.value)
    assert len(message) < 400 and "\n" not in message
    assert all(text in message for text in says), message


@pytest.mark.parametrize("name", PASSES)
def test_batches_of_other_pictures_or_words(name, passes, model, batch, pictures):
    """JAX reads the last entry in place of one beyond the end: another picture, another word."""
    run = passes[name]
    for wrong in (
        batch.replace(features=batch.features[:-1]),
        pictures.replace(pixels=pictures.pixels[:1]),
    ):
        refused(lambda wrong=wrong: run(model, wrong, None, None), " tiles and places for 9")
    for word in (model.config.lm.vocab, -1):
        ids = batch.ids.copy()
        ids[2, 8] = word
        refused(
            lambda ids=ids: run(model, batch.replace(ids=ids), None, None),
            f"row 2 of the batch: token 8 has id {word}, and the model has words 0 to 95",
        )


@pytest.mark.parametrize("name", PASSES)
def test_wrong_models_and_batches(name, passes, model, batch):
    run = passes[name]
    processor = tiny.processor(model.config)
    for wrong in (
        processor,
        "embedded",
        (model, processor),
        batch,
        model.config,
        type(model),
        None,
    ):
        refused(lambda wrong=wrong: run(wrong, batch, None, None), "model is of type", "mj.load")
    for wrong in (
        "what is shown ?",
        [batch, batch],
        processor,
        model,
        None,
        {"ids": 1},
        np.ones(3),
    ):
        refused(lambda wrong=wrong: run(model, wrong, None, None), "batch is of type", "processor(")
    refused(lambda: run(batch, model, None, None), "model is of type Batch")


@pytest.mark.parametrize("name", PASSES)
def test_wrong_edits(name, passes, model, batch):
    run = passes[name]
    for wrong in ([EDIT], [EDIT, EDIT], EDIT.items[0], "ablate lm.mlp.act", S.lm.mlp.act, KEEP, 32):
        kind = type(wrong).__name__
        refused(
            lambda wrong=wrong: run(model, batch, wrong, None), f"edits is of type {kind}", ">>"
        )


@pytest.mark.parametrize("name", [name for name in PASSES if name != "score"])
def test_wrong_captures(name, passes, model, batch):
    run, site = passes[name], S.lm.mlp.act
    for wrong in (mj.keep(site), [mj.keep(site)], "lm.mlp.act", EDIT):
        refused(
            lambda wrong=wrong: run(model, batch, None, wrong), "captures is of type", "mj.keep("
        )
    for wrong in (site, site[1], "lm.mlp.act", EDIT, None, mj.keep):
        refused(lambda wrong=wrong: run(model, batch, None, {"x": wrong}), "capture 'x' is of type")
    refused(
        lambda: run(model, batch, None, {1: mj.keep(site)}), "name 1 of a capture is of type int"
    )


def test_one_batch_where_several_are_read(model, batch, tmp_path):
    for wrong in (batch, "abc", None, 3, {"a": batch}):
        works = (
            lambda wrong=wrong: mj.reduce(STATS, model, wrong),
            lambda wrong=wrong: mj.collect(KEEP, model, wrong, tmp_path / "x"),
            lambda wrong=wrong: fit.fit(model, wrong, fit.Recipe()),
        )
        for work in works:
            refused(work, f"batches is of type {type(wrong).__name__}, expected", "[batch]")
    refused(lambda: fit.fit(model, iter([batch]), fit.Recipe()), "batches is of type list_iterator")
    refused(lambda: fit.fit([batch], model, fit.Recipe()), "model is of type list")
    refused(lambda: fit.fit(model, [batch], {"rate": 1.0}), "recipe is of type dict")
    refused(lambda: fit.fit(model, [], fit.Recipe()), "no batch to train on")
    refused(lambda: fit.fit(model, ["a"], fit.Recipe()), "batch is of type str")
    refused(lambda: fit.Recipe(part=None), "part is of type NoneType")
    refused(lambda: fit.evaluate(model, batch), "batches is of type Batch")
    refused(lambda: fit.evaluate(model, []), "there is no batch")
    refused(lambda: mj.collect({}, model, [batch], tmp_path / "x"), "no capture to collect")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [0, -1, 2.5, 3.0, "4", None, True, np.ones(2, int), 10**12, pytest.param(10**5000, id="huge")],
)
def test_numbers_that_do_not_count(wrong, model, batch, tmp_path):
    site = S.lm.mlp.act
    works = {
        "max_new_tokens": lambda: mj.generate(model, batch, max_new_tokens=wrong),
        "lens k": lambda: mj.lens(S.lm.resid_post, k=wrong),
        "top k": lambda: mj.top(site, k=wrong),
        "bottom k": lambda: mj.bottom(site, k=wrong),
        "sample k": lambda: mj.sample(site, k=wrong),
        "every": lambda: mj.reduce(STATS, model, [batch], every=wrong),
        "accumulate": lambda: fit.Recipe(accumulate=wrong),
    }
    if wrong is not None:
        works["chunk"] = lambda: mj.sweep(metric, model, batch, [EDIT], chunk=wrong)
    if not isinstance(wrong, int) or wrong != 10**12:
        works["shard_bytes"] = lambda: mj.collect(
            KEEP, model, [batch], tmp_path / "x", shard_bytes=wrong
        )
    for name, work in works.items():
        refused(work, f"{name}=", "is not a whole number from 1")


def test_whole_numbers_of_numpy_and_jax(model, batch):
    for three in (np.int64(3), jax.numpy.int32(3)):
        assert mj.lens(S.lm.resid_post, k=three).k == 3


@pytest.mark.parametrize(
    "wrong", [-1.0, float("nan"), float("inf"), "0.1", 10**400, 1j, [1.0, 2.0]]
)
def test_numbers_that_do_not_measure(wrong, model, batch):
    for name in ("rate", "projector_rate", "weight_decay", "clip", "warmup"):
        refused(lambda name=name: fit.Recipe(**{name: wrong}), f"{name}=", "not a finite number")
    refused(lambda: fit.Recipe(warmup=1.5), "warmup=1.5 is not a finite number from 0 to 1")
    key = jax.random.key(0)
    refused(lambda: mj.generate(model, batch, temperature=wrong, key=key), "temperature=")


@pytest.mark.parametrize(
    "key", [None, 3, "seed", np.ones(2), jax.random.split(jax.random.key(0), 2)]
)
def test_what_is_no_key(key, model, batch):
    refused(lambda: mj.generate(model, batch, temperature=1.0, key=key), "jax.random.key(seed)")


@pytest.mark.parametrize("stop", ["</s>", ["</s>"], [2], 2, None])
def test_what_does_not_say_whether_to_stop(stop, model, batch):
    """Each but None ended a row at the stop ids of the processor, whatever it named."""
    refused(lambda: mj.generate(model, batch, stop=stop), "stop is of type", "processor.stop_ids")


def test_wrong_arguments_of_sweeps(model, batch):
    for wrong in (EDIT, "ablate", None, 3):
        refused(lambda wrong=wrong: mj.sweep(metric, model, batch, wrong), "edits is of type")
    for wrong in ([[EDIT], [EDIT]], [None, EDIT], [EDIT, S.lm.mlp.act]):
        refused(lambda wrong=wrong: mj.sweep(metric, model, batch, wrong), "edits is of type", ">>")
    for wrong in ("logits", None, [metric]):
        refused(lambda wrong=wrong: mj.sweep(wrong, model, batch, [EDIT]), "metric is of type")
    refused(lambda: mj.sweep(model, metric, batch, [EDIT]), "is of type")
    for wrong in ("lats", None, ["last"]):
        work = [
            lambda w=wrong: mj.sweep(metric, model, batch, [EDIT], logits=w),
            lambda w=wrong: mj.run(model, batch, logits=w),
        ]
        for pass_ in work:
            refused(pass_, f'logits="{wrong}" is not one of last, all, none')


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[[3, 96]]] * 8, "row 0, number 0: id 96 at token 1: ids must be below 96"),
        ([[[3, 4], [-7, -1]]] * 8, "number 1: id -7 at token 0"),
        ([[[3, -1, 4]]] * 8, "id 4 at token 2: ids must be below 96, .* and -1 after the last"),
        ([[[-1, 4]]] * 8, "id 4 at token 1"),
        ([[[10**6, -1]]] * 8, "id 1000000"),
    ],
)
def test_ids_that_no_candidate_has(ids, says, model, batch):
    """They gave a number: of the last word, or of one that is left out."""
    with pytest.raises(ValueError, match=says):
        mj.score(model, batch, np.array(ids))
