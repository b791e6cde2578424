from __future__ import annotations

import functools
import math

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import mllm_jax as mj
from mllm_jax import families
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.loading import load
from mllm_jax.models import internvit, pixtral, qwen_vision, siglip
from mllm_jax.models.projector import Projector, ProjectorConfig
from mllm_jax.sharding import mesh, rules
from tests.helpers import released

TINY = (llava.LlavaConfig, llava_next.LlavaNextConfig, instructblip.InstructBlipConfig)


def abstract(data: int = 1, model: int = 1, fsdp: int = 1) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((data, fsdp, model), mesh.AXES)


@functools.cache
def shapes_of(config) -> dict[str, tuple[int, ...]]:
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return {load.dotted(path): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def specs(config, mesh) -> dict[str, P]:
    table = families.of(config).sharding_rules(config)
    return rules.specs(config, table, shapes_of(config), mesh)


def parts(spec: P, mesh) -> int:
    axes = [axis for axis in spec if axis]
    assert len(axes) == len(set(axes)), f"{spec} uses an axis twice"
    return math.prod(mesh.shape[axis] for axis in axes)


def stays_whole(config, path: str) -> bool:
    """Heads, words and neurons that 8 does not divide, and tables of positions and of a Q-Former."""
    part = getattr(config, path.split(".")[0], None)
    if ".attn." in path or ".look." in path:
        return getattr(part, "kv_heads", part.heads) % 8 > 0
    if path in ("lm.embed", "lm.head.kernel"):
        return part.vocab % 8 > 0
    if ".mlp." in path and path.startswith("vision."):  # of Qwen2.5-VL: 3,420
        return part.mlp % 8 > 0
    return path in ("qformer.words", "vision.position")


@pytest.mark.parametrize("name", released.EVERY)
def test_every_parameter_of_a_released_model_has_a_rule(name):
    """And nearly all bytes are split (not norms and patches), also over both axes; layers never."""
    config = families.RELEASED[name]()
    shapes = shapes_of(config)
    for where, share in ((abstract(model=8), 8), (abstract(fsdp=8), 8), (abstract(2, 4, 2), 8)):
        found = specs(config, where)
        assert found.keys() == shapes.keys()
        for path, spec in found.items():
            assert len(spec) <= len(shapes[path])
            assert ".layers." not in path or spec[0] is None
        size = {path: math.prod(s) for path, s in shapes.items() if not stays_whole(config, path)}
        total = sum(size.values())
        held = sum(n / parts(found[path], where) for path, n in size.items())
        assert held < 1.05 * total / share, (where, held * share / total)


@pytest.mark.parametrize("config", [kind.tiny() for kind in TINY])
def test_a_mesh_of_one_device_splits_nothing(config):
    assert not any(any(spec) for spec in specs(config, abstract()).values())


@pytest.mark.parametrize(
    "build",
    [
        lambda rngs: siglip.SiglipConfig.tiny().build(rngs=rngs),
        lambda rngs: internvit.InternVitConfig(
            layers=1, qk_norm=True, final_norm=True, norm="rms"
        ).build(rngs=rngs),
        lambda rngs: qwen_vision.QwenVision(qwen_vision.QwenVisionConfig.tiny("2.5"), rngs=rngs),
        lambda rngs: qwen_vision.QwenVision(qwen_vision.QwenVisionConfig.tiny("3"), rngs=rngs),
        lambda rngs: pixtral.PixtralVision(pixtral.PixtralConfig.tiny(), rngs=rngs),
    ],
    ids=["siglip", "internvit", "qwen2.5", "qwen3", "pixtral"],
)
def test_every_parameter_of_a_tower_has_a_rule(build):
    state = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    paths = [f"vision.{load.dotted(path)}" for path in dict(nnx.to_flat_state(state))]
    found = rules.match(paths, rules.VISION)
    assert all(found[path][0] == "L" for path in paths if ".layers." in path)


@pytest.mark.parametrize(
    "config",
    [
        ProjectorConfig.pooled(8, 8, pool=2, eps=1e-6),
        ProjectorConfig(in_width=8, out_width=8, depth=1, bias=False, fold=2),
        ProjectorConfig.shuffled(8, 8),
        ProjectorConfig.qwen(8, 8, norm="layer", deepstack=3),
        ProjectorConfig.merging(8, 8, eps=1e-5, bias=True),
    ],
    ids=["gemma3", "idefics3", "internvl", "qwen3", "mistral3"],
)
def test_every_parameter_of_a_projector_has_a_rule(config):
    state = nnx.state(nnx.eval_shape(lambda: Projector(config, rngs=nnx.Rngs(0))))
    leaves = {f"projector.{load.dotted(path)}": x for path, x in nnx.to_flat_state(state)}
    found = rules.match(leaves, rules.projector(config.depth))
    assert all(len(found[path]) == x.ndim for path, x in leaves.items())


def test_heads_are_not_cut():
    """Four query heads and two key-value heads, of width 8: 8 parts would divide the axis."""
    found = specs(llava.LlavaConfig.tiny(), abstract(model=8))
    assert (
        found["lm.layers.attn.q.kernel"] == found["lm.layers.attn.k.kernel"] == P(None, None, None)
    )
    assert found["lm.layers.mlp.up.kernel"] == P(None, None, "model")
    assert found["lm.embed"] == P("model", None)
    found = specs(llava.LlavaConfig.tiny(), abstract(model=2, fsdp=4))
    assert found["lm.layers.attn.k.kernel"] == P(None, "fsdp", "model")
    assert found["lm.layers.mlp.down.kernel"] == P(None, "model", "fsdp")


def test_parameters_without_a_rule_or_with_two_are_listed():
    table = (*rules.DECODER, (r"lm\.em.*", P("V", None)))
    paths = ["lm.embed", "lm.head.kernel", "lm.layers.mlp.gate.scale", "vision.cls"]
    with pytest.raises(ValueError) as error:
        rules.match(paths, table)
    assert str(error.value) == (
        "parameters without a sharding rule: lm.layers.mlp.gate.scale, vision.cls; parameters with "
        r"more than one: lm.embed (lm\.embed and lm\.em.*); every parameter needs one "
        "(mllm_jax.sharding.rules)"
    )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"data": 2, "model": 4},
            "mesh(data=2, model=4, fsdp=1) needs 8 devices, there are only 1",
        ),
        ({"data": 0}, "mesh(data=0, model=1, fsdp=1): each must be 1 or more"),
    ],
)
def test_a_mesh_has_as_many_devices_as_there_are(how, says):
    with pytest.raises(ValueError) as error:
        mj.mesh(**how, devices=jax.devices()[:1])
    assert says in str(error.value)
