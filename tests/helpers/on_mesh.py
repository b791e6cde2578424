"""Every pass on a mesh of 8 fake devices beside the same on one device; see `test_on_mesh`.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 MESH=2x4 FAMILIES=llava \
        pytest tests/helpers/on_mesh.py

Not collected by itself: the devices of a process are fixed when JAX starts.
"""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import binding, logit_lens
from mllm_jax.loading import load, parameters, save
from mllm_jax.passes import generate, run, score
from mllm_jax.planning import exchanges, plan, programs
from mllm_jax.sharding import hosts, memory, mesh, rules
from mllm_jax.training import fit
from tests.helpers import tiny, tiny_families

jax.config.update("jax_disable_most_optimizations", True)  # they take long to compile

if "JAX_NUM_PROCESSES" in os.environ:
    number, count = (int(os.environ[f"JAX_{n}"]) for n in ("PROCESS_ID", "NUM_PROCESSES"))
    hosts.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, number)

SIZES = [int(n) for n in os.environ["MESH"].split("x")]
PROMPTS = ["what is shown ?", "is it a cat or a dog ?", "which kind : red", "what is it ?"]
SIDES = [(24, 24), (24, 60), (50, 20), (40, 44)]
CAPTURES = {
    "fire": mj.stats(S.lm.mlp.act, by=tok.kind),
    "seen": mj.stats(S.vision.mlp.act, by=tok.kind),
    "lens": mj.lens(S.lm.resid_post, k=4, where=tok.image),
    "says": mj.lens(S.lm.resid_post, by=("image", "question")),
    "words": mj.distribution(S.lm.resid_post, by=("image", "question")),
    "kept": mj.keep(S.lm.resid_post[2]),
    "mass": mj.mass(S.lm.attn.pattern, on=tok.image, where=tok.last),
}
EDITS = (
    mj.ablate(S.lm.mlp.act[1, [3, 40]])
    >> mj.add(S.projector.out, np.linspace(-1, 1, 32, dtype=np.float32), where=tok.image)
    >> mj.scale(S.lm.attn.heads[2, [1]], 0.5)
    >> mj.project_out(S.lm.resid_post[2], np.eye(32, dtype=np.float32)[:, :2])
    >> mj.knockout(S.lm.attn[3:], to=tok.last, on=tok.image)
)


@pytest.fixture(scope="module")
def on_mesh() -> jax.sharding.Mesh:
    data, model, *fsdp = SIZES
    return mj.mesh(data=data, model=model, fsdp=fsdp[0] if fsdp else 1)


@pytest.fixture(scope="module", params=os.environ["FAMILIES"].split())
def family(request, random_model, on_mesh):
    """(model, the same on the mesh, processor)."""
    model = random_model(tiny_families.CONFIGS[request.param])
    return model, spread(model, on_mesh), tiny_families.processor(request.param)


def spread(model, on_mesh):
    """The model's parameters by rule on the mesh."""
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    shapes = {load.dotted(path): leaf.shape for path, leaf in flat.items()}
    table = families.of(model.config).sharding_rules(model.config)
    places = rules.shardings(model.config, table, shapes, on_mesh)

    def place(x, path):  # also on devices of another process
        where, whole = places[load.dotted(path)], np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: whole[index])

    put = {path: leaf.replace(place(leaf[...], path)) for path, leaf in flat.items()}
    return nnx.merge(graph, nnx.from_flat_state(put))


def batch_of(processor, count: int = 7):
    """Rows of unlike lengths and pictures, the last ones empty."""
    pictures = [tiny.picture(i, *SIDES[i % 4]) for i in range(count)]
    return processor(pictures, [PROMPTS[i % 4] for i in range(count)], rows=8)


def assert_same(one, two) -> None:
    """Integers exactly, floats within 1e-5 of values of order 1."""
    paths = jax.tree_util.tree_leaves_with_path(one)
    for (path, a), b in zip(paths, jax.tree.leaves(two), strict=True):
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        if not np.issubdtype(a.dtype, np.floating):
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        finite = np.isfinite(a)
        np.testing.assert_array_equal(a[~finite], b[~finite], err_msg=name)
        np.testing.assert_allclose(b[finite], a[finite], rtol=1e-5, atol=1e-5, err_msg=name)


def test_run(family):
    one, many, processor = family
    batch = batch_of(processor)
    assert_same(*(mj.run(m, batch, EDITS, CAPTURES) for m in (one, many)))


def test_generate(family):
    one, many, processor = family
    batch = batch_of(processor)
    found = [mj.generate(m, batch, EDITS, max_new_tokens=5) for m in (one, many)]
    assert found[0].text == found[1].text
    assert_same(*((g.tokens, g.receipts) for g in found))


def test_sample(family):
    """The noise does not depend on where it is drawn."""
    one, many, processor = family
    how = {"max_new_tokens": 3, "temperature": 1.0, "key": jax.random.key(0)}
    assert_same(*(mj.generate(m, batch_of(processor), **how).tokens for m in (one, many)))


def test_score(family):
    one, many, processor = family
    batch, options = batch_of(processor), ["a cat", "a red ship", "yes"]
    captures = {"last": CAPTURES["kept"]}
    assert_same(*(score.score_with(m, batch, options, EDITS, captures) for m in (one, many)))


def first(out):
    return out.logits[:, :5], out["fire"].positive, out.receipts


def test_sweep(family):
    """Of more lanes than parts, and not a multiple of them."""
    one, many, processor = family
    batch = batch_of(processor)
    edits = [mj.ablate(S.lm.mlp.act[i % 4, [i]], where=tok.text) for i in range(11)]
    captures = {"fire": CAPTURES["fire"]}
    (logits, fire, receipts), (same, counts, equal) = (
        mj.sweep(first, m, batch, edits, captures) for m in (one, many)
    )
    assert_same((logits, receipts), (same, equal))
    assert (fire != counts).any(0).sum() <= 2  # most lanes share the values of a unit
    for lane in np.unique(np.nonzero(fire != counts)[0]):
        assert_same_counts(fire[lane], counts[lane], one, [batch], edits[lane])


def assert_same_counts(fire, counts, model, batches, edits=None) -> None:
    """Partial sums are added in another order: only the sign of a value near 0 may differ."""
    for layer, unit, kind in np.argwhere(fire != counts):
        kept = {"act": mj.keep(S.lm.mlp.act[int(layer), [int(unit)]])}
        values = [np.asarray(mj.run(model, batch, edits, kept)["act"]) for batch in batches]
        near = sum((abs(v) < ZERO).sum() for v in values)
        assert abs(fire - counts)[layer, unit, kind] <= near


ZERO = 1e-7  # of values of order 1: their sign is rounding, and no program's own


def test_reduce(family):
    one, many, processor = family
    batches = [batch_of(processor, count) for count in (8, 8, 3)]
    captures = {name: CAPTURES[name] for name in ("fire", "says")}
    found, same = (mj.reduce(captures, m, batches) for m in (one, many))
    fire, counts = (out["fire"].positive for out in (found, same))
    assert (fire != counts).sum() <= 2
    assert_same_counts(fire, counts, one, batches)
    assert_same(*(of_order_1(out, fire) for out in (found, same)))


def of_order_1(found, counts):
    """Sums of values of both signs cancel: they are told as parts of the most they could be."""
    fire = found["fire"]
    most = np.sqrt(fire.tokens[:, None] * fire.squares)  # by Cauchy and Schwarz
    total = fire.sum / np.where(most, most, 1)
    return found | {"fire": dataclasses.replace(fire, sum=total, positive=counts)}


def lessons(processor):
    """Two questions on every other picture, packed where the model can read packed rows."""
    turns = [[("what is shown ?", "a cat"), ("which kind ?", "red")], [("is it a ship ?", "no")]]
    pictures = [tiny.picture(i, *SIDES[i % 4]) for i in range(8)]
    if processor.config.attends_forward != "prompt":
        return processor.pack(pictures, turns * 4)
    with pytest.raises(ValueError, match="pack: each picture of this model attends to the questio"):
        processor.pack(pictures, turns * 4)
    questions, answers = zip(*(row[0] for row in turns * 4), strict=True)
    return processor(pictures, list(questions), answers=list(answers))


def test_fit(family):
    """Every part that trains stays where it was."""
    one, many, processor = family
    batch = lessons(processor)
    recipe = fit.Recipe(part="projector+lm", rate=1e-2, remat=True)
    (after, curve), (sharded, same) = (fit.fit(m, [batch] * 4, recipe) for m in (one, many))
    assert curve[-1] < curve[0]
    np.testing.assert_allclose(same, curve, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(sharded), strict=True):
        assert b.sharding.is_equivalent_to(a.sharding, a.ndim)


def test_rows_that_share_pictures(family):
    """Two pictures for eight rows, and five, which are as good as one a row; and four pairs."""
    one, many, processor = family
    for count, each in ((2, 1), (5, 1), (4, 2)):
        pictures = [
            [tiny.picture(each * i + n, *SIDES[i % 4]) for n in range(each)] for i in range(count)
        ]
        prompts = [PROMPTS[0]] * 8
        batch = processor([pictures[i * 3 % count] for i in range(8)], prompts)
        assert batch.shares_tiles == (count < 5)
        assert_same(*(mj.run(m, batch, logits="all").logits for m in (one, many)))


def test_a_row_alone(family):
    one, many, processor = family
    batch = processor([tiny.picture(0, 40, 44)], PROMPTS[:1])
    captures = {name: CAPTURES[name] for name in ("lens", "fire")}
    assert_same(*(mj.run(m, batch, None, captures) for m in (one, many)))


def test_rows_that_do_not_divide(family):
    _, many, processor = family
    batch = processor([tiny.picture(0)] * 3, PROMPTS[:3])
    parts = int(np.prod(SIZES)) // SIZES[1]
    if parts == 1:
        pytest.skip("rows are not split")
    with pytest.raises(ValueError, match=f"a batch of 3 rows does not divide over the {parts} "):
        mj.run(many, batch)


def test_a_pass_inside_of_a_program_of_the_user(family):
    """The arrays say where they lie, also while they are traced."""
    one, many, processor = family
    batch = batch_of(processor).replace(processor=None)

    @jax.jit
    def both(model, gate):
        out = mj.run(model, batch, mj.scale(S.lm.mlp.act, gate), {"lens": CAPTURES["lens"]})
        return out.logits, out["lens"]

    gate = np.linspace(0, 1, many.config.lm.mlp, dtype=np.float32)
    assert_same(*(both(m, gate) for m in (one, many)))


def test_bytes_on_a_device(family):
    _, many, _ = family
    parts = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(many)]
    assert memory.bytes_on_device(many) == sum(part.nbytes for part in parts)


def test_a_checkpoint_is_read_once(family, on_mesh, tmp_path, monkeypatch):
    one, many, _ = family
    directory = save.save_hf(one, None, tmp_path / "checkpoint")
    read, copy = [], parameters._copy
    monkeypatch.setattr(parameters, "_copy", lambda a, b: (read.append(b.nbytes), copy(a, b)))
    with jax.set_mesh(on_mesh):
        found = load.read_model(directory)
    monkeypatch.undo()
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    assert_same(one, found)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(found), strict=True):
        assert b.sharding == a.sharding


def lowered(many, processor, name: str) -> jax.stages.Lowered:
    """The program of a pass."""
    batch = batch_of(processor).replace(processor=None)
    asked = binding.bind(many, batch, None, CAPTURES)[1]
    options = score.candidate_ids(processor, ["a cat", "yes"], len(batch.ids))
    with mesh.use_mesh_of(many):
        batch = mesh.shard_batch(batch)
        if name == "run":
            return run.compiled_run.lower(many, batch, (), asked, logits="last", remat=False)
        if name == "score":
            return score.compiled_score.lower(many, batch, (), {}, options)
        stops = np.full((1,), -1, np.int32)
        how = {"steps": 3, "greedy": True}
        return generate.compiled_generate.lower(many, batch, (), stops, np.float32(1), None, **how)


def gathered(text: str) -> list[int]:
    """How many numbers each all-gather brings."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


@pytest.mark.parametrize("name", ["run", "generate", "score"])
def test_nothing_large_is_gathered(family, name):
    """No activation, no vocabulary and no weights: the best words of each part alone."""
    if len(SIZES) > 2:
        pytest.skip("fully sharded layers are gathered")
    _, many, processor = family
    program = lowered(many, processor, name)
    jax.config.update("jax_disable_most_optimizations", False)
    sizes = gathered(program.compile().as_text())
    jax.config.update("jax_disable_most_optimizations", True)
    best = logit_lens.LENS_CHUNK * CAPTURES["lens"].k * SIZES[1]
    assert best < batch_of(processor).ids.size // SIZES[0] * many.config.lm.width
    assert max(sizes, default=0) <= best * (SIZES[1] > 1)


def test_only_the_layer_in_use_is_gathered(family, on_mesh, monkeypatch):
    """A step of training gathers weights, one layer at a time, and gives back where it took."""
    if on_mesh.shape["fsdp"] == 1:
        pytest.skip("each data shard has all of the model")
    config = family[0].config
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, vocab=104))
    size = programs.Size(rows=2, words=20, answer=5)  # no width is that of the vocabulary
    monkeypatch.setattr(exchanges, "SMALL_BYTES", 0)
    jax.config.update("jax_disable_most_optimizations", False)
    found = plan.plan(config, size, topology=on_mesh, study="e2e", dtype=jnp.float32)
    jax.config.update("jax_disable_most_optimizations", True)
    assert "layer" in {c["of"] for c in found.collectives if c["kind"] == "all-gather"}
    assert not found.gathers()
    assert found.bytes["results"] < 1000 < found.bytes["optimiser"]
