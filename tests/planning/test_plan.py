"""Plans: work counted by hand, programs read, branches of accelerators, and what is promised."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

import mllm_jax as mj
from benchmarks import released
from experiments.plan import planning
from mllm_jax import families, store
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import model as llava
from mllm_jax.interventions import binding
from mllm_jax.passes import run
from mllm_jax.planning import (
    chips,
    compilation,
    exchanges,
    hlo,
    hlo_collectives,
    hlo_work,
    placement,
    plan,
    programs,
    search,
    work,
)
from mllm_jax.sharding import mesh as mesh_
from mllm_jax.training import parts

TINY = llava.LlavaConfig.tiny()
SIZE = programs.Size(rows=2, words=20, steps=5, lanes=3)

# Lines of a program that the compiler for TPU wrote, shortened.
TPU = """HloModule jit__run, is_scheduled=true, num_partitions=8

%fused.1 (p.0: bf16[32,64,128], p.1: s32[]) -> bf16[1,64,128] {
  %p.0 = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %zero, %zero)
}

%condition (c.0: (s32[], bf16[4,16,64], bf16[32,64,128])) -> pred[] {
  %c.0 = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[32,64,128]{2,1,0}) parameter(0)
  %layers = s32[]{:T(128)} constant(32)
  %i.0 = s32[]{:T(128)} get-tuple-element(%c.0), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.0, %layers), direction=LT, metadata={op_name="while/lt"}
}

%body (b.0: (s32[], bf16[4,16,64], bf16[32,64,128])) -> (s32[], bf16[4,16,64], bf16[32,64,128]) {
  %b.0 = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[32,64,128]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b.0), index=0
  %x = bf16[4,16,64]{2,1,0} get-tuple-element(%b.0), index=1
  %w = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b.0), index=2
  %layer = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i.1), kind=kLoop, calls=%fused.1
  %heads = bf16[8,16,64,1]{2,1,0,3:T(8,128)(2,1)S(1)} bitcast(%layer)
  %rows = bf16[4,16,64,1]{2,1,3,0} bitcast(%x)
  %split = bf16[4,16,8,16]{1,3,2,0} convolution(%rows, %heads), window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
  %dot = bf16[4,16,128]{2,1,0} convolution(%x, %layer), window={size=1}, dim_labels=0bf_0io->0bf
  %all = bf16[4,16,128]{2,1,0} all-reduce(%dot), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add, metadata={op_name="while/body/dot"}
  ROOT %next = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[32,64,128]{2,1,0}) tuple(%i.1, %x, %w)
}

ENTRY %main (a.0: bf16[4,16,64], a.1: bf16[32,64,128], a.2: bf16[8,4,40,16]) -> bf16[4,16,64] {
  %a.0 = bf16[4,16,64]{2,1,0} parameter(0)
  %a.1 = bf16[32,64,128]{2,1,0} parameter(1)
  %a.2 = bf16[8,4,40,16]{3,2,1,0} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %scores = bf16[8,4,40,40]{3,2,1,0} convolution(%a.2, %a.2), window={size=8x4 stride=7x3 lhs_dilate=8x4}, dim_labels=01bf_01oi->01bf
  %g.0 = (bf16[4,16,64]{2,1,0}, bf16[8,16,64]{2,1,0}) all-gather-start(%a.0), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, metadata={op_name="gather"}
  %g.1 = bf16[8,16,64]{2,1,0} all-gather-done(%g.0)
  %start = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}, /*index=2*/bf16[32,64,128]{2,1,0}) tuple(%zero.1, %a.0, %a.1)
  %loop = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0}, bf16[32,64,128]{2,1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="while"}
  ROOT %out = bf16[4,16,64]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def products(config: llava.LlavaConfig, B: int, T: int) -> int:
    """Multiplications and additions of the matrix products of one pass with logits at one token."""
    lm, vision, projector = config.lm, config.vision, config.projector
    heads, keys = lm.heads * lm.head_width, lm.kv_heads * lm.head_width
    layer = T * lm.width * (2 * heads + 2 * keys + 3 * lm.mlp) + 2 * T * T * heads
    words = lm.layers * layer + lm.width * lm.vocab
    E, P = vision.width, vision.grid**2
    block = (P + 1) * E * (4 * E + 2 * vision.mlp) + 2 * (P + 1) ** 2 * E
    picture = vision.run_layers * block + P * vision.patch**2 * 3 * E
    D = projector.out_width
    image = config.image_tokens * (projector.in_width * projector.fold**2 * D + D * D)
    return 2 * B * (words + picture + image)


def one_device() -> jax.sharding.Mesh:
    return mesh_.mesh(1, devices=jax.devices()[:1])


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jnp.ones((4, 8)), jnp.ones((7, 8, 8))
    assert work.flops(loop, x, w) == 7 * 2 * 4 * 8 * 8
    program = hlo.Program(jax.jit(loop).lower(x, w).compile().as_text())
    assert program.loops() == [7]
    assert hlo_work.count_work(program).flops == 7 * 2 * 4 * 8 * 8


def test_products_are_those_of_the_network():
    found = plan.plan(TINY, SIZE, topology=one_device())
    assert found.tokens == programs.TOKEN_MULTIPLE and found.rows == 2
    assert found.ideal == products(TINY, 2, found.tokens)
    assert found.flops == found.ideal  # as the compiler wrote them
    assert found.how == plan.COMPILED and found.bytes["activations"] > 0
    assert found.moved > found.bytes["weights"] and not found.collectives


def test_a_program_for_tpus_is_read():
    program = hlo.Program(TPU)
    assert program.loops() == [32]
    done = hlo_work.count_work(program)
    inside = 2 * 4 * 16 * 64 * 128  # of each of the two convolutions in the loop
    scores = 2 * 8 * 4 * 40 * 40 * 16  # a product for each of 8 x 4, not for every pair of them
    assert done.flops == 32 * 2 * inside + scores
    gather, reduce = done.collectives
    assert (gather.kind, str(gather.array), gather.group, gather.times) == (
        "all-gather", "bf16[8,16,64]", 2, 1,
    )  # fmt: skip
    assert gather.received == 8 * 16 * 64 * 2 / 2
    assert (reduce.kind, reduce.group, reduce.times, reduce.source) == (
        "all-reduce", 4, 32, "while/body/dot",
    )  # fmt: skip
    assert reduce.received == 2 * 3 / 4 * 4 * 16 * 128 * 2
    # Of the stacked weights one layer is read in each round; what lies on the chip is free.
    layer, x, out = (2 * n for n in (64 * 128, 4 * 16 * 64, 4 * 16 * 128))
    once = layer + 4 + (x + out) + (x + out) + 2 * out
    before = 2 * 2 * 8 * 4 * 40 * 16 + 2 * 8 * 4 * 40 * 40 + x + 2 * x
    assert done.moved == 32 * once + before


# A gather that the compiler for TPU lets go on beside a product, and an all-reduce of which each chip
# keeps a part.
ASYNC = """HloModule jit_update, is_scheduled=true, num_partitions=8

%begin (p.0: bf16[512,256]) -> (bf16[512,256], bf16[4096,256], u32[]) {
  %p.0 = bf16[512,256]{1,0} parameter(0)
  %gather.0 = bf16[4096,256]{1,0} all-gather(%p.0), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[512,256]{1,0}, bf16[4096,256]{1,0}, u32[]{:S(2)}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[512,256], p.2: bf16[4096,256], p.3: bf16[64,32], p.4: bf16[32,16]) -> (bf16[64,16], bf16[512,256], bf16[4096,256], bf16[4096,256]) {
  %p.1 = bf16[512,256]{1,0} parameter(0)
  %p.2 = bf16[4096,256]{1,0} parameter(1)
  %p.3 = bf16[64,32]{1,0} parameter(2)
  %p.4 = bf16[32,16]{1,0} parameter(3)
  %product = bf16[64,16]{1,0} convolution(%p.3, %p.4), dim_labels=bf_io->bf
  %gather.1 = bf16[4096,256]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[64,16]{1,0}, bf16[512,256]{1,0}, bf16[4096,256]{1,0}, bf16[4096,256]{1,0}) tuple(%product, %p.1, %p.2, %gather.1)
}

%end (p.5: bf16[512,256], p.6: bf16[4096,256]) -> bf16[4096,256] {
  %p.5 = bf16[512,256]{1,0} parameter(0)
  %p.6 = bf16[4096,256]{1,0} parameter(1)
  %gather.2 = bf16[4096,256]{1,0} all-gather(%p.5), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %ended = bf16[4096,256]{1,0} custom-call(%p.5, %p.6, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (p.7: bf16[4096,256]) -> bf16[512,256] {
  %p.7 = bf16[4096,256]{1,0} parameter(0)
  %sum = bf16[4096,256]{1,0} all-reduce(%p.7), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add
  %chip = u32[] partition-id()
  %first = u32[] constant(0)
  ROOT %kept = bf16[512,256]{1,0} dynamic-slice(%sum, %chip, %first), dynamic_slice_sizes={512,256}
}

ENTRY %main (a.0: bf16[512,256], a.1: bf16[64,32], a.2: bf16[32,16]) -> bf16[512,256] {
  %a.0 = bf16[512,256]{1,0} parameter(0)
  %a.1 = bf16[64,32]{1,0} parameter(1)
  %a.2 = bf16[32,16]{1,0} parameter(2)
  %f.0 = (bf16[512,256]{1,0}, bf16[4096,256]{1,0}, u32[]{:S(2)}) fusion(%a.0), kind=kCustom, calls=%begin
  %shard = bf16[512,256]{1,0} get-tuple-element(%f.0), index=0
  %whole = bf16[4096,256]{1,0} get-tuple-element(%f.0), index=1
  %f.1 = (bf16[64,16]{1,0}, bf16[512,256]{1,0}, bf16[4096,256]{1,0}, bf16[4096,256]{1,0}) fusion(%shard, %whole, %a.1, %a.2), kind=kCustom, calls=%beside
  %f.2 = bf16[4096,256]{1,0} fusion(%shard, %whole), kind=kCustom, calls=%end
  ROOT %f.3 = bf16[512,256]{1,0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_collective_beside_other_work_counts_once():
    done = hlo_work.count_work(hlo.Program(ASYNC))
    gather, scatter = done.collectives
    assert (gather.kind, str(gather.array), gather.times) == ("all-gather", "bf16[4096,256]", 1)
    assert (scatter.kind, str(scatter.array)) == ("reduce-scatter", "bf16[512,256]")
    part = 2 * 512 * 256
    assert gather.received == scatter.received == 7 * part
    begun, product, kept = (
        part + part + 8 * part,
        2 * (64 * 32 + 32 * 16 + 64 * 16),
        8 * part + part,
    )
    assert done.moved == begun + product + kept


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups={}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", 2),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_how_many_chips_exchange(groups, count):
    op = hlo.Op("x", (), "all-reduce", (), f", channel_id=1, {groups}, to_apply=%add", False)
    assert hlo_collectives.group_size(op, 8) == count


def test_chips_that_cannot_be_read_are_an_error():
    op = hlo.Op("x", (), "all-reduce", (), ", replica_groups=@all", False)
    with pytest.raises(ValueError, match="cannot be read"):
        hlo_collectives.group_size(op, 8)


def test_a_loop_that_counts_by_two_runs_half_as_often():
    lines = TPU.replace("tuple(%i.1, %x, %w)", "tuple(%i.2, %x, %w)").splitlines()
    at = next(n for n, line in enumerate(lines) if "%layer = " in line)
    lines[at:at] = [
        "  %two = s32[]{:T(128)} constant(2)",
        "  %i.2 = s32[]{:T(128)} add(%i.1, %two)",
    ]
    once, twice = (hlo.Program("\n".join(text)) for text in (TPU.splitlines(), lines))
    assert twice.loops() == [16]
    assert [c.times for c in hlo_work.count_work(twice).collectives] == [1, 16]
    assert [c.times for c in hlo_work.count_work(once).collectives] == [1, 32]


def test_what_chips_exchange_is_told_by_its_shape():
    network = programs.abstract_model(llava.LlavaConfig.llava_1_5_7b(), jnp.bfloat16)
    mesh = jax.sharding.AbstractMesh((2, 1, 4), mesh_.AXES)
    subject = exchanges.classifier(network, mesh)
    found = {
        shape: subject(hlo.Array("bf16", shape))
        for shape in (
            (4096, 2752), (1, 4096, 11008), (32, 4096, 2752), (32064, 4096), (16, 640, 32064),
            (8, 640, 4096), (16, 640, 2752), (1024, 4096), (8, 16),
        )
    }  # fmt: skip
    assert list(found.values()) == [
        "layer", "layer", "stack", "vocabulary", "vocabulary", "activation", "activation",
        "layer", "numbers",
    ]  # fmt: skip
    assert subject(hlo.Array("s32", (16, 640, 640))) == "indices"


def test_what_is_whole_to_be_used_where_chips_share_one_copy():
    network = programs.abstract_model(llava.LlavaConfig.llava_1_5_7b(), jnp.bfloat16)
    shared = exchanges.classifier(network, jax.sharding.AbstractMesh((1, 2, 4), mesh_.AXES))
    found = {
        shape: shared(hlo.Array("bf16", shape))
        for shape in (
            (8016, 4096), (4096, 8016), (8, 128, 4096), (4096, 8, 128), (32064, 4096),
            (32064, 2048), (8, 640, 4096), (32, 4096, 2752),
        )
    }  # fmt: skip
    assert list(found.values()) == [
        "weights", "weights", "layer", "layer", "vocabulary", "vocabulary", "activation", "stack",
    ]  # fmt: skip


@pytest.mark.parametrize("study", [*programs.STUDIES, "counts+lens"])
def test_shapes_alone_tell_what_a_chip_holds(study, monkeypatch):
    monkeypatch.setattr(compilation, "has_tpu_compiler", lambda: False)
    found = plan.plan(TINY, SIZE, topology="v5e:2x4", study=study, data=2)
    whole = plan.plan(TINY, SIZE, topology="v5e:1x1", study=study, data=1)
    assert found.how == plan.SHAPES and found.fits is None
    assert (found.data, found.fsdp, found.model) == (2, 1, 4)
    assert "From shapes only" in found.table()
    network = programs.abstract_model(TINY, jnp.bfloat16)
    trained = {"projection": (network.projector,), "e2e": (network.projector, network.lm)}
    count = parts.size(trained.get(study, ()))  # float32, as its two moments
    assert whole.bytes["weights"] == 2 * parts.size(network) + 2 * count
    assert 8 * count <= whole.bytes.get("optimiser", 0) <= 8 * count + 16
    assert whole.bytes["weights"] / 4 < found.bytes["weights"] < whole.bytes["weights"]
    # Two shards of the batch, or of the lanes, over eight chips: a fourth of the work of one chip.
    assert found.flops * 4 == pytest.approx(whole.flops, rel=0.02)
    assert found.limit in ("compute", "memory")


def test_what_is_lowered_for_a_tpu_takes_the_branches_of_accelerators(monkeypatch):
    monkeypatch.setattr(
        "mllm_jax.numerics.rows.MAX_ELEMENTS_AT_ONCE", 0
    )  # else this size takes one branch everywhere
    network, batch = (
        programs.abstract_model(TINY, jnp.bfloat16),
        programs.abstract_batch(TINY, SIZE),
    )
    captures = {"fire": mj.stats(S.lm.mlp.act, by=tok.kind)}
    _, asked = binding.bind(network, batch, None, captures)
    jax.clear_caches()  # of another MAX_ELEMENTS_AT_ONCE
    traced = run.compiled_run.trace(network, batch, (), asked, logits="none", remat=False)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    loops = {name: lines.count("stablehlo.while") for name, lines in text.items()}
    assert loops["tpu"] == 2 < loops["cpu"]  # the layers of both networks, and no rows
    barriers = {name: lines.count("optimization_barrier") for name, lines in text.items()}
    assert barriers["tpu"] == 0 < barriers["cpu"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"topology": "v9:2x4"}, "the chips are v4, v5e, v5p, v6e"),
        ({"topology": "v5e:3x3"}, "the slices of v5e are 1x1"),
        ({"study": "guess"}, "is not one of run, counts"),
        ({"data": 3}, "does not divide the 8 chips"),
        ({"study": "projection", "edits": mj.ablate(S.lm.mlp.act[0])}, "takes no edits"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(how, message, monkeypatch):
    monkeypatch.setattr(compilation, "has_tpu_compiler", lambda: False)
    with pytest.raises(ValueError, match=message):
        plan.plan(TINY, SIZE, **how)


def test_slices_in_order():
    assert [str(s) for s in chips.Slice.parse("v5e:4x8").larger()] == [
        "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16",
    ]  # fmt: skip
    for chip in chips.CHIPS.values():
        counts = [chips.Slice.parse(f"v5p:{s}" if len(s) > 5 else f"v5e:{s}").chips
                  for s in chip.slices if s.count("x") == 1]  # fmt: skip
        assert counts == sorted(counts)


@pytest.fixture
def compiler(monkeypatch):
    """Sets a compiler by the GiB of its programs' intermediate arrays for a number of rows."""

    def install(gib):
        def compiled(program, options):
            rows = len(dict(program.args)["batch"].ids)
            return compilation.Compiled(nothing, temporary=int(gib(rows) * chips.GIB))

        nothing = "ENTRY %main () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}"
        monkeypatch.setattr(compilation, "lower", lambda program, mesh: program)
        monkeypatch.setattr(compilation, "compile_lowered", compiled)
        monkeypatch.setattr(placement, "topology_mesh", lambda *how: one_device())

    return install


def test_the_smallest_slice_and_the_largest_batch(compiler):
    compiler(lambda rows: 3 + 0.5 * rows)
    number, found = search.largest_that_fits("rows", TINY, SIZE, topology="v5e:2x4", study="counts")
    assert number == int((16 * search.USABLE - 3) / 0.5) and found.fits
    many = programs.Size(rows=40)
    assert (
        search.smallest_topology(TINY, many, topology="v5p:2x2x1", study="counts").topology
        == "v5p:2x2x1"
    )
    assert search.smallest_topology(TINY, many, topology="v5e:2x4", study="counts") is None
    with pytest.raises(ValueError, match="40 rows do not fit"):
        search.largest_that_fits("rows", TINY, many, topology="v5e:2x4", study="counts")


def test_the_largest_batch_where_few_rows_take_no_memory(compiler):
    """Up to 10 rows the memory is the same."""
    asked = []
    compiler(lambda rows: asked.append(rows) or 3 + 0.5 * max(0, rows - 10))
    four = programs.Size(rows=4)
    number, found = search.largest_that_fits("rows", TINY, four, topology="v5e:2x4", study="counts")
    assert found.fits and 10 < number <= 10 + int((16 * search.USABLE - 3) / 0.5)
    assert max(asked) <= 8 * search.MAX_GROWTH


def test_the_command_writes_table_json_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilation, "has_tpu_compiler", lambda: False)
    options = planning.Options(
        model="embedded", topologies=["v5e:2x4"], studies=["counts", "sweep"],
        edits="ablate lm.mlp.act[3]",
    )  # fmt: skip
    planning.run(options, str(tmp_path))
    found = store.read_json(tmp_path / "plan.json")
    assert [p["study"] for p in found["plans"]] == ["counts", "sweep"]
    assert found["plans"][0]["bytes"]["edits"] > 0
    assert (tmp_path / "plan.md").read_text().strip().endswith(capsys.readouterr().out.strip())
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("study", ["projection", "e2e"])
def test_what_trains_reuses_its_memory(study):
    """As training donates it: of all that a step gives, only the loss is new."""
    found = plan.plan(TINY, SIZE, topology=one_device(), study=study)
    assert found.how == plan.COMPILED and found.bytes["optimiser"] > 1000 > found.bytes["results"]


def test_gathers_of_what_should_stay():
    """Where chips share one copy, weights in use may be gathered; a stack never."""
    words = "numbers", "indices", "layer", "weights", "stack", "vocabulary", "activation"
    exchanged = tuple({"kind": "all-gather", "of": word} for word in words)
    whole = plan.plan(TINY, SIZE, topology=one_device(), compile=False)
    for fsdp, bad in ((1, words[2:]), (8, words[4:])):
        found = dataclasses.replace(whole, fsdp=fsdp, collectives=exchanged)
        assert tuple(c["of"] for c in found.gathers()) == bad


@pytest.mark.slow
@pytest.mark.skipif(
    not compilation.has_tpu_compiler(), reason="needs libtpu, the compiler for TPUs"
)
def test_compiled_for_tpus_a_step_gathers_one_layer_at_a_time():
    lm = dataclasses.replace(
        TINY.lm, width=1024, heads=8, kv_heads=8, head_width=128, mlp=2816, vocab=8000
    )
    projector = dataclasses.replace(TINY.projector, out_width=lm.width)
    wide = dataclasses.replace(TINY, lm=lm, projector=projector)  # shards are whole tiles of a TPU
    found = plan.plan(wide, SIZE, topology="v5e:2x4", study="e2e", data=1, fsdp=8)
    assert found.how == plan.COMPILED and found.fits and not found.gathers()
    assert any(c["kind"] == "all-gather" and c["of"] == "layer" for c in found.collectives)
    assert found.bytes["results"] < found.bytes["optimiser"] / 10


@pytest.mark.slow
@pytest.mark.skipif(
    not compilation.has_tpu_compiler(), reason="needs libtpu, the compiler for TPUs"
)
def test_compiled_for_tpus_nothing_is_gathered_that_should_stay():
    found = plan.plan(TINY, SIZE, topology="v5e:2x4", study="counts+lens", data=2)
    assert found.how == plan.COMPILED and found.fits
    assert found.flops == pytest.approx(found.ideal, rel=0.5)
    assert not found.gathers()


RECIPES = "llava-1.5-7b", "llava-1.5-13b", "llava-next-vicuna-7b", "instructblip-vicuna-7b"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    not compilation.has_tpu_compiler(), reason="needs libtpu, the compiler for TPUs"
)
@pytest.mark.parametrize("study", ["counts+lens", "sweep", "projection"])
@pytest.mark.parametrize("name", RECIPES)
def test_compiled_for_tpus_every_recipe_fits_and_gathers_nothing(name, study):
    """Those of docs/pods.md on eight chips."""
    size = programs.Size(rows=8, lanes=4, words=64)
    found = plan.plan(families.RELEASED[name](), size, topology="v5e:2x4", study=study)
    assert found.how == plan.COMPILED and found.fits
    assert not found.gathers()
    assert found.flops == pytest.approx(found.ideal, rel=0.05) or "instructblip" in name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    not compilation.has_tpu_compiler(), reason="needs libtpu, the compiler for TPUs"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:2x4"])
def test_compiled_for_tpus_7b_trains_whole_where_chips_share_one_copy(topology):
    """docs/pods.md: four chips are the fewest."""
    of = chips.Slice.parse(topology)
    size, config = programs.Size(rows=1, words=64), llava.LlavaConfig.llava_1_5_7b()
    found = plan.plan(config, size, topology=topology, study="e2e", data=1, fsdp=of.chips)
    assert found.how == plan.COMPILED and found.fits
    assert not found.gathers()
    assert any(c["of"] == "layer" for c in found.collectives if c["kind"] == "all-gather")


def test_plans_of_released_models_are_kept_and_a_stopped_run_continues(tmp_path, monkeypatch):
    measured = []

    def largest(field, config, size, *, topology, study):
        measured.append((topology, size.rows))
        if size.rows > 2:
            raise ValueError("4 rows do not fit")
        made = plan.plan(config, dataclasses.replace(size, rows=3), topology=topology,
                         study=study, compile=False)  # fmt: skip
        return 3, made

    monkeypatch.setattr(search, "largest_that_fits", largest)
    monkeypatch.setattr(compilation, "has_tpu_compiler", lambda: False)
    argv = ["--models=smolvlm-256m,qwen2-vl-72b", "--topology=v5e:2x4", f"--out={tmp_path}"]
    found = released.main(argv)
    assert measured == [("v5e:2x4", 4), ("v5e:2x4", 1)]
    small, large = found.values()
    assert small["rows"] == 3 and small["batch"] == 3 * int(small["mesh"].split()[0])
    assert large["rows"] == 0 and large["total"] > large["capacity"]  # its weights alone
    lines = (tmp_path / "released.md").read_text().splitlines()
    assert lines[2].startswith("| smolvlm-256m | ") and f" {small['batch']} rows on " in lines[2]
    assert " no: " in lines[3]
    assert released.main(argv) == found and len(measured) == 2
    with pytest.raises(ValueError, match="it is of --study=run; give another --out"):
        released.main([*argv, "--study=counts"])


@pytest.mark.parametrize(
    ("mesh", "fits", "rows"),
    [("2 x 1 x 4", True, 41), ("1 x 1 x 8", True, 7), ("2 x 1 x 4", False, 7)],
)
def test_a_larger_slice_has_the_rows_of_a_smaller_one(mesh, fits, rows, monkeypatch):
    """If it splits the model alike, and if they fit there."""
    planned = types.SimpleNamespace(
        mesh="16 x 1 x 4", data=16, fsdp=1, tokens=128, total=10, capacity=16
    )
    monkeypatch.setattr(
        plan, "plan", lambda config, size, **how: types.SimpleNamespace(
            fits=None if "compile" in how else fits, **vars(planned)
        ),
    )  # fmt: skip
    monkeypatch.setattr(search, "largest_that_fits", lambda *args, **how: (7, planned))
    small = {"mesh": mesh, "rows": 41, "capacity": 16}
    found = released.measure("smolvlm-256m", "v5e:8x8", "run", 4, [small])
    assert found["rows"] == rows and found["batch"] == 16 * rows
