"""A mesh of one device, and none; those of more devices are in `on_mesh.py`."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import binding
from mllm_jax.passes import run
from mllm_jax.sharding import mesh

LENS = {"lens": mj.lens(S.lm.resid_post, k=2, where=tok.image)}


def traced(model, batch, captures) -> str:
    asked = binding.bind(model, batch, None, captures)[1]
    return str(run.compiled_run.trace(model, batch, (), asked, logits="last", remat=False).jaxpr)


@pytest.mark.parametrize("captures", [{}, LENS])
def test_without_a_mesh_the_program_has_nothing_of_it(tiny_model, make_batch, captures):
    found = traced(tiny_model, make_batch(), captures)
    assert "sharding_constraint" not in found and "shard_map" not in found
    with jax.set_mesh(mj.mesh(1, devices=jax.devices()[:1])):
        assert "sharding_constraint" in traced(tiny_model, make_batch(), captures)


def test_a_mesh_of_one_device_gives_the_same(tiny_model, make_batch):
    on_mesh = mj.mesh(devices=jax.devices()[:1])
    assert dict(on_mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}
    spread = jax.device_put(tiny_model, NamedSharding(on_mesh, P()))
    one, other = (mj.run(model, make_batch(), None, LENS) for model in (tiny_model, spread))
    assert other.logits.sharding.mesh == on_mesh
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_an_axis_is_split_over():
    abstract = jax.sharding.AbstractMesh(
        (2, 3, 4), mesh.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    assert mesh.axes_for("B", 12) is None and mesh.partition_spec("BTF", (6, 5, 8)) == P(
        None, None, None
    )
    with jax.sharding.use_abstract_mesh(abstract):
        assert mesh.partition_spec("BTF", (12, 5, 8)) == P(("data", "fsdp"), None, "model")
        assert mesh.partition_spec("BTN", (9, 5, 6)) == P(None, None, None)  # they do not divide
        assert mesh.shard_count("I", 6) == 6 and mesh.shard_count("I", 4) == 1


class Chip:
    """A chip of a TPU slice as far as a mesh looks at it."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v6 lite", 0, 0

    def __init__(self, row: int, column: int, slice_index: int = 0):
        self.id = 8 * row + column
        self.coords = (row, column, 0)
        self.slice_index = slice_index


@pytest.mark.parametrize(("data", "model"), [(64, 1), (32, 2), (16, 4), (8, 8)])
def test_a_mesh_may_split_the_axes_of_a_slice(data, model):
    slice_ = [Chip(row, column) for row in range(8) for column in range(8)]
    found = mj.mesh(data=data, model=model, devices=slice_)
    assert found.devices.shape == (data, 1, model)
    assert set(found.devices.flat) == set(slice_)


def test_a_mesh_of_several_slices_is_refused():
    slices = [Chip(row, column, row // 4) for row in range(8) for column in range(8)]
    with pytest.raises(ValueError, match="devices are of several slices"):
        mj.mesh(data=64, devices=slices)
