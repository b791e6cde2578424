"""Plans for GPUs: names, the chips' figures, their description to the compiler, and what it finds."""

from __future__ import annotations

import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mllm_jax as mj
from mllm_jax import families
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.families.llava import model as llava
from mllm_jax.models import attention, cudnn_attention
from mllm_jax.planning import (
    chips,
    compilation,
    gpu_targets,
    hlo,
    hlo_work,
    placement,
    plan,
    programs,
    search,
)

TINY = llava.LlavaConfig.tiny()
SIZE = programs.Size(rows=2, words=20, steps=5, lanes=3)
GPUS = "h100", "h200", "a100", "l40s"
needs_compiler = pytest.mark.skipif(
    not compilation.has_gpu_compiler(),
    reason="needs jax-cuda13-plugin, the compiler for GPUs: the extra plan-gpu",
)


@pytest.mark.parametrize("kind", GPUS)
def test_a_gpu_alone_is_one_and_a_number_says_how_many(kind):
    assert chips.Slice.parse(kind).chips == 1
    for count in (1, 2, 4, 8):
        slice_ = chips.Slice.parse(f"{kind}:{count}")
        assert slice_.chips == count and slice_.chip is chips.CHIPS[kind]
    assert [s.chips for s in chips.Slice.parse(kind).larger()] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:3", "topology 'h100:3': the slices of h100 are 1, 2, 4, 8"),
        ("h100:16", "topology 'h100:16': the slices of h100 are 1"),
        ("a100:2x4", "topology 'a100:2x4': the slices of a100 are 1"),
        ("h200:", "topology 'h200:': the slices of h200 are 1"),
        ("l40s:08", "topology 'l40s:08': the slices of l40s are 1"),
        ("H100", "topology 'H100': the chips are v4, v5e, v5p, v6e, h100, h200, a100, l40s"),
        ("h100x8", "topology 'h100x8': the chips are"),
        ("v5e", "topology 'v5e': the slices of v5e are 1x1"),
    ],
)
def test_what_is_no_topology_is_refused(topology, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.plan(TINY, SIZE, topology=topology, compile=False)


@pytest.mark.parametrize(
    ("kind", "tflops", "gigabytes", "gigabytes_per_second", "links"),
    [
        ("h100", 1979 / 2, 80, 3352, 900),
        ("h200", 1979 / 2, 141, 4800, 900),
        ("a100", 624 / 2, 80, 2039, 600),
        ("l40s", 362.05, 48, 864, 64),
    ],
)
def test_the_figures_of_the_data_sheets(kind, tflops, gigabytes, gigabytes_per_second, links):
    chip = chips.CHIPS[kind]
    assert chip.platform == "cuda"
    assert chip.flops == tflops * 1e12
    assert chip.bandwidth == gigabytes_per_second * 1e9
    assert chip.links == links * 1e9 / 2
    # Sheets count in 2^30 bytes (H100, A100) or 10^9; the driver keeps some.
    assert 0.98e9 * gigabytes < chip.memory < 2**30 * gigabytes


def fields(text: str) -> dict[str, str]:
    """The fields of a text proto, by dotted name; nothing else may stand in it."""
    found, path = {}, []
    for name, opening, value, closing in re.findall(
        r'(\w+)\s*(?:(\{)|:\s*("[^"]*"|[\w.]+))|(\})', text
    ):
        if closing:
            path.pop()
        elif opening:
            path.append(name)
        else:
            assert found.setdefault(".".join([*path, name]), value) is value, name
    assert not path
    return found


@pytest.mark.parametrize("kind", [k for k, chip in chips.CHIPS.items() if chip.platform == "cuda"])
def test_the_description_of_a_gpu(kind):
    found, chip = fields(gpu_targets.target_config(kind)), chips.CHIPS[kind]
    assert found["platform_name"] == '"CUDA"'
    assert kind.upper() in found["device_description_str"]
    device = {name.split(".", 1)[1]: v for name, v in found.items() if name.startswith("gpu_")}
    assert int(device["device_memory_size"]) == chip.memory
    assert int(device["memory_bandwidth"]) == chip.bandwidth
    # A block leaves 1 KiB of the shared memory of its core to the system.
    optin = int(device["shared_memory_per_block_optin"])
    assert int(device["shared_memory_per_core"]) - optin == 1024
    # Float32 operations per second of the data sheets: 67, 67, 19.5 and 91.6 TFLOPs.
    float32 = {"h100": 67, "h200": 67, "a100": 19.5, "l40s": 91.6}[kind]
    units = int(device["core_count"]) * int(device["fpus_per_core"])
    assert 2 * units * float(device["clock_rate_ghz"]) / 1e3 == pytest.approx(float32, rel=0.01)
    capability = {"h100": (9, 0), "h200": (9, 0), "a100": (8, 0), "l40s": (8, 9)}[kind]
    assert capability == tuple(
        int(device[f"cuda_compute_capability.{name}"]) for name in ("major", "minor")
    )


@pytest.mark.parametrize("topology", ["h100", "l40s:4"])
def test_without_the_compiler_one_line_says_what_to_install(topology, monkeypatch):
    monkeypatch.setattr(compilation, "has_gpu_compiler", lambda: False)
    for search_ in (plan.plan, search.smallest_topology):
        with pytest.raises(ValueError, match=r"pip install 'mllm-jax\[plan-gpu\]'") as error:
            search_(TINY, SIZE, topology=topology, study="counts")
        said = str(error.value)
        assert said.startswith(f"topology '{chips.Slice.parse(topology)}': ")
        assert "\n" not in said and len(said) < 400


def test_without_cudnn_no_other_program_is_planned(monkeypatch):
    monkeypatch.setattr(compilation, "has_gpu_compiler", lambda: True)
    monkeypatch.setattr(cudnn_attention, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^topology 'h100:1': cuDNN is missing: pip install"):
        plan.plan(TINY, SIZE, topology="h100", study="counts")


def test_from_shapes_a_plan_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(compilation, "has_gpu_compiler", lambda: False)
    one, eight = (
        plan.plan(TINY, SIZE, topology=name, study="counts", data=data, compile=False)
        for name, data in (("h100", 1), ("h100:8", 2))
    )
    assert (eight.how, eight.data, eight.model, eight.rows) == (plan.SHAPES, 2, 4, 4)
    assert one.capacity == eight.capacity == chips.CHIPS["h100"].memory
    assert eight.flops == pytest.approx(one.flops / 4)
    assert one.seconds["compute"] == one.flops / 989.5e12


# A loop whose length is data around one of three trips, which copies a layer before its product.
LOOPS = """HloModule jit_f, is_scheduled=true

%slice (p.0: f32[3,8,8], p.1: s32[]) -> f32[1,8,8] {
  %p.0 = f32[3,8,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = f32[1,8,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%inner (b.0: (s32[], f32[4,8], f32[3,8,8])) -> (s32[], f32[4,8], f32[3,8,8]) {
  %b.0 = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b.0), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%b.0), index=1
  %w = f32[3,8,8]{2,1,0} get-tuple-element(%b.0), index=2
  %copy = f32[1,8,8]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%slice
  %weights = f32[8,8]{1,0} bitcast(%copy)
  %dot = f32[4,8]{1,0} dot(%x, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) tuple(%i, %dot, %w)
}

%less (c.0: (s32[], f32[4,8], f32[3,8,8])) -> pred[] {
  %c.0 = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%outer (o.0: (s32[], f32[4,8], f32[3,8,8])) -> (s32[], f32[4,8], f32[3,8,8]) {
  %o.0 = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  ROOT %layers = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) while(%o.0), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (a.0: s32[], a.1: f32[4,8], a.2: f32[3,8,8]) -> f32[4,8] {
  %a.0 = s32[] parameter(0)
  %a.1 = f32[4,8]{1,0} parameter(1)
  %a.2 = f32[3,8,8]{2,1,0} parameter(2)
  %twice = f32[4,8]{1,0} add(%a.1, %a.1)
  %start = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) tuple(%a.0, %twice, %a.2)
  %tokens = (s32[], f32[4,8]{1,0}, f32[3,8,8]{2,1,0}) while(%start), condition=%less, body=%outer
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%tokens), index=1
}
"""


def test_bytes_of_each_trip_count_a_copied_layer_three_times():
    program = hlo.Program(LOOPS)
    layer, x, index = 8 * 8 * 4, 4 * 8 * 4, 4
    trip = 3 * (2 * layer + index + (layer + 2 * x))  # read and written, then read by the product
    assert hlo_work.moved_per_trip(program) == trip
    assert hlo_work.count_work(program, unknown=5).moved == 5 * trip + 3 * x


# A GPU converts while it reads: of three layers this reads one.
CONVERTED = """HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[3,8,8]) -> f32[1,8,8] {
  %p.0 = bf16[3,8,8]{2,1,0} parameter(0)
  %wide = f32[3,8,8]{2,1,0} convert(%p.0)
  ROOT %layer = f32[1,8,8]{2,1,0} slice(%wide), slice={[1:2], [0:8], [0:8]}
}

ENTRY %main (a.0: bf16[3,8,8]) -> f32[1,8,8] {
  %a.0 = bf16[3,8,8]{2,1,0} parameter(0)
  ROOT %out = f32[1,8,8]{2,1,0} fusion(%a.0), kind=kLoop, calls=%fused
}
"""


def test_a_slice_of_what_is_converted_reads_the_slice():
    assert hlo_work.count_work(hlo.Program(CONVERTED)).moved == 8 * 8 * (2 + 4)


# Attention of 2 rows, 640 queries and 3,072 keys, with 32 heads of queries and 8 of keys.
ATTENTION = """HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[2,640,32,128], k: bf16[2,3072,8,128], v: bf16[2,3072,8,128]) -> bf16[2,32,640,128] {
  %q = bf16[2,640,32,128]{3,2,1,0} parameter(0)
  %k = bf16[2,3072,8,128]{3,2,1,0} parameter(1)
  %v = bf16[2,3072,8,128]{3,2,1,0} parameter(2)
  %both = (bf16[2,32,640,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"mask_type": "NO_MASK"}}
  ROOT %heads = bf16[2,32,640,128]{3,1,2,0} get-tuple-element(%both), index=0
}
"""


def test_the_attention_of_cudnn_is_counted():
    products = 2 * 2 * 2 * 32 * 640 * 3072 * 128  # two of an addition and a multiplication each
    work = hlo_work.count_work(hlo.Program(ATTENTION))
    assert work.flops == products
    assert work.moved == 2 * 2 * 128 * (2 * 640 * 32 + 2 * 3072 * 8)
    causal = ATTENTION.replace("NO_MASK", "CAUSAL")
    assert hlo_work.count_work(hlo.Program(causal)).flops == products / 2


@pytest.mark.parametrize(
    ("separate", "topology", "rows", "steps"),
    [
        (True, "h100", 8, 64), (False, "h100", 8, 8), (False, "l40s", 8, 64),
        (False, "v5e:2x4", 8, 64), (False, "h100", 64, 64), (True, "h100:2", 8, 64),
    ],
)  # fmt: skip
def test_layers_are_separate_where_a_second_copy_fits(separate, topology, rows, steps, monkeypatch):
    """Of LLaVA-1.5-7B with 8 rows: half of the rest of 79 GiB, not of 44."""
    config, placed = families.RELEASED["llava-1.5-7b"](), []
    monkeypatch.setattr(placement, "place_layers", _recording(placement.place_layers, placed))
    size = programs.Size(rows=rows, steps=steps)
    plan.plan(config, size, topology=topology, study="generate", compile=False)
    assert [program.static["separate_layers"] for program in placed] == [separate]


def _recording(function, results):
    def recorded(*args):
        results.append(function(*args))
        return results[-1]

    return recorded


@pytest.mark.slow
def test_a_generation_says_what_a_token_moves():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "model"))
    found = plan.plan(TINY, SIZE, topology=mesh, study="generate")
    layers = programs.abstract_model(TINY, jnp.bfloat16).lm.layers
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    assert read < found.moved_per_token < found.moved / (SIZE.steps - 1)
    assert "bytes moved by a token" in found.table()
    counts = plan.plan(TINY, SIZE, topology=mesh, study="counts")
    assert counts.moved_per_token is None and "by a token" not in counts.table()


@pytest.mark.parametrize(
    "message", ["INTERNAL: libdevice not found at ./libdevice.10.bc", "No ptxas binary was found."]
)
def test_a_missing_part_of_the_compiler_is_named(message):
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(ValueError, match=r"does not find (libdevice|ptxas): pip install"):
        compilation.compile_lowered(Lowered())
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compilation.compile_lowered(Lowered())


@pytest.mark.parametrize(
    ("message", "used", "temporary"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. "
         "Exceeded hbm capacity by 1.75G.", 17.5, 0),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (16.25G) exceeds available HBM (15.75G).", 0, 16.25),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_for_tpus_refuses_does_not_fit(
    message, used, temporary, monkeypatch
):
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(message)

    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "model"))
    monkeypatch.setattr(compilation, "lower", lambda program, mesh: Lowered())
    monkeypatch.setattr(compilation, "has_tpu_compiler", lambda: True)
    monkeypatch.setattr(placement, "topology_mesh", lambda *how: mesh)
    found = plan.plan(TINY, SIZE, topology="v5e:2x4", study="counts")
    held = found.total - found.bytes["activations"]
    assert found.fits is False and 0 < held < 2**30
    assert found.bytes["activations"] == max(int(used * 2**30) - held, int(temporary * 2**30))


def test_the_extra_installs_the_plugin_of_the_version_of_jax():
    said = importlib.metadata.metadata("jax")
    assert "cuda13-local" in said.get_all("Provides-Extra")
    needs = [r for r in said.get_all("Requires-Dist") if '"cuda13-local"' in r]
    assert any("jax-cuda13-plugin" in r and jax.__version__ in r for r in needs)


@needs_compiler
@pytest.mark.parametrize("topology", [*GPUS, "h100:4"])
def test_compiled_for_gpus_a_product_is_counted(topology):
    slice_ = chips.Slice.parse(topology)
    mesh = Mesh(np.array(compilation.topology_devices(slice_)), ("x",))
    n = slice_.chips

    def arg(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    lowered = jax.jit(lambda x, w: jnp.tanh(x @ w).sum(1)).lower(
        arg((256, 512), P(None, "x")), arg((512, 128), P("x"))
    )
    found = compilation.compile_lowered(lowered, compilation.topology_options(slice_))
    done = hlo_work.count_work(hlo.Program(found.text))
    assert done.flops == 2 * 256 * 512 * 128 / n
    assert done.moved >= (256 * 512 + 512 * 128) * 2 / n
    assert [c.kind for c in done.collectives] == ["all-reduce"] * (n > 1)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", GPUS)
def test_compiled_for_gpus_no_array_holds_scores(kind):
    """Of causal grouped queries in lanes, of all rows with one mask, and without a mask."""
    slice_ = chips.Slice.parse(kind)
    place = NamedSharding(Mesh(np.array(compilation.topology_devices(slice_)), "x"), P())

    def arg(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def attend(query, key, value, mask):
        causal = functools.partial(attention.attend, causal=True)
        return (
            jax.vmap(causal, (0, None, None, None))(query, key, value, mask),
            attention.attend(query[0], key, value, mask[:1]),
            attention.attend(query[1], key, value, None),
        )

    lowered = jax.jit(attend).lower(
        arg(3, 2, 577, 8, 72), *[arg(2, 2, 577, 72)] * 2, arg(2, 1, 577, 577, dtype=bool)
    )
    found = compilation.compile_lowered(lowered, compilation.topology_options(slice_))
    assert found.text.count('custom_call_target="__cudnn$fmha') == 3
    assert not re.search(r"f32\[[\d,]*577,577\]", found.text)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("topology", ["h100", "h100:4"])
@pytest.mark.parametrize("study", ["counts", "generate"])
def test_compiled_for_gpus_a_study_does_the_work_of_its_shapes(study, topology):
    found = plan.plan(TINY, SIZE, topology=topology, study=study)
    assert found.how == plan.COMPILED and found.fits and not found.gathers()
    # cuDNN, on one GPU, leaves out the products of queries with later keys.
    later = 2 * SIZE.rows * TINY.lm.layers * found.tokens**2 * TINY.lm.width
    assert found.flops == pytest.approx(found.ideal - later * (topology == "h100"), rel=0.01)
    assert found.moved > found.bytes["weights"] and found.bytes["activations"] > 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("rows", [1, 8])
def test_compiled_for_gpus_a_token_reads_weights_and_cache_once(rows):
    config = families.RELEASED["llava-1.5-7b"]()
    edits = mj.ablate(S.lm.mlp.act[12], where=tok.generating)
    size = programs.Size(rows=rows, steps=64)
    found = plan.plan(config, size, edits, topology="h100", study="generate")
    model = programs.abstract_model(config, jnp.bfloat16)
    read = placement.bytes_per_chip((model.lm.layers, model.lm.head))
    lm, slots = config.lm, found.tokens + size.steps - 1
    cache = 2 * 2 * lm.layers * rows * lm.kv_heads * slots * lm.head_width
    assert found.moved_per_token <= 1.15 * (read + cache)
