"""Directions from sets of states, and the file that holds one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.analysis import directions

D = 32
HERE = S.lm.resid_post[2]


def states(seed=0, n=12, shift=1.0):
    """Two sets that differ along one axis, of unequal scales by unit."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=D))
    a, b = rng.normal(size=(2, n, D)) * scale
    return a + shift * np.eye(D)[3] * scale, b


def made(**changes) -> directions.Direction:
    fields = {"where": "image|last", "kind": "means", "model": "tiny"} | changes
    vectors = np.random.default_rng(1).normal(size=(2, D)).astype(np.float32)
    return directions.Direction(S.lm.resid_post, (1, 3), vectors, **fields)


def test_the_difference_of_means_needs_no_pairs():
    a, b = states()
    found = directions.find("means", a, b[:5], HERE, where="image", model="tiny")
    np.testing.assert_allclose(found.vectors[0], a.mean(0) - b[:5].mean(0), rtol=1e-5)
    assert (found.layers, found.where, found.kind, found.model) == ((2,), "image", "means", "tiny")
    np.testing.assert_allclose(found.norms, [np.sqrt(np.sum((a.mean(0) - b[:5].mean(0)) ** 2))])


def test_the_component_is_the_principal_axis_of_pairs_in_both_orders():
    a, b = states(shift=0.5)
    found = directions.find("component", a, b, HERE).vectors[0].astype(np.float64)
    both = np.concatenate([a - b, b - a])
    axis = np.linalg.eigh(np.cov(both.T))[1][:, -1]
    unit = found / np.linalg.norm(found)
    assert abs(unit @ axis) > 1 - 1e-6
    np.testing.assert_allclose(found @ unit, unit @ (a - b).mean(0), rtol=1e-5)
    assert unit @ (a - b).mean(0) > 0
    assert abs(unit @ (a - b).mean(0)) < 0.9 * np.linalg.norm((a - b).mean(0))


def test_the_probe_is_a_logistic_regression_in_the_units_of_the_states():
    """Newton's method in all coordinates of the standardised states finds the same weights."""
    a, b = states(shift=0.7)
    found = directions.find("probe", a, b[:9], HERE).vectors[0].astype(np.float64)
    x, sign = np.concatenate([a, b[:9]]), np.repeat([1.0, -1.0], [12, 9])
    z = np.append((x - x.mean(0)) / x.std(0), np.ones((21, 1)), 1)
    decay, weight = np.append(np.ones(D), 0), np.zeros(D + 1)
    for _ in range(30):
        share = 1 / (1 + np.exp(sign * (z @ weight)))
        slope = decay * weight - z.T @ (sign * share)
        weight -= np.linalg.solve(np.diag(decay) + (z.T * share * (1 - share)) @ z, slope)
    assert np.abs(slope).max() < 1e-10
    want, unit = weight[:-1] / x.std(0), found / np.linalg.norm(found)
    np.testing.assert_allclose(unit, want / np.linalg.norm(want), atol=1e-5)
    np.testing.assert_allclose(found @ unit, unit @ (a.mean(0) - b[:9].mean(0)), rtol=1e-5)


def test_layers_are_found_one_by_one_and_named():
    pairs = [states(seed) for seed in range(3)]
    a, b = (np.stack(sets) for sets in zip(*pairs, strict=True))
    for target, layers in [
        (S.lm.resid_post, (0, 1, 2)), (S.lm.resid_post[[4, 1, 7]], (4, 1, 7)),
        (S.lm.resid_post[5:8], (5, 6, 7)),
    ]:  # fmt: skip
        found = directions.find("probe", a, b, target)
        assert found.layers == layers
        alone = directions.find("probe", *pairs[1], S.lm.resid_post[layers[1]])
        np.testing.assert_allclose(found.vectors[1], alone.vectors[0], rtol=1e-6)
    assert directions.find("means", *pairs[0], S.projector.out).layers == ()


def test_the_edit_adds_each_vector_in_its_layer_at_its_tokens(tiny_model, make_batch):
    batch, direction = make_batch(), made()
    capture = {"x": mj.keep(S.lm.resid_post[[1, 3]])}

    def states_with(strength, kept=(1, 1)):
        vectors = direction.vectors * np.float32(kept)[:, None]
        edit = dataclasses.replace(direction, vectors=vectors).edit(strength)
        return np.asarray(mj.run(tiny_model, batch, edit, capture, logits="none")["x"])

    clean, only, both = states_with(0.0), states_with(2.0, (1, 0)), states_with(2.0)
    at = np.asarray((tok.image | tok.last).mask(batch.tokens))[..., None]
    np.testing.assert_allclose(only[0] - clean[0], 2 * at * direction.vectors[0], atol=1e-5)
    np.testing.assert_allclose(both[1] - only[1], 2 * at * direction.vectors[1], atol=1e-5)


def test_a_random_direction_has_the_norms_and_no_more():
    direction = made()
    one, other = direction.random_like(0), direction.random_like(1)
    np.testing.assert_allclose(one.norms, direction.norms, rtol=1e-6)
    cosines = [
        np.sum(a.vectors * b.vectors, -1) / direction.norms**2
        for a, b in [(one, direction), (other, direction), (one, other)]
    ]
    assert np.abs(cosines).max() < 0.9
    assert one.kind == "random" and one.layers == direction.layers


def test_a_file_gives_the_same_direction_and_a_record_that_others_can_read(tmp_path):
    direction, path = made(), tmp_path / "d.safetensors"
    directions.write(direction, path)
    again = directions.read(path)
    np.testing.assert_array_equal(again.vectors, direction.vectors)
    for field in dataclasses.fields(direction):
        if field.name != "vectors":
            assert getattr(again, field.name) == getattr(direction, field.name)
    with safetensors.safe_open(path, "np") as opened:
        record = opened.metadata()
        np.testing.assert_array_equal(opened.get_tensor("vectors"), direction.vectors)
    assert record["site"] == "lm.resid_post" and json.loads(record["layers"]) == [1, 3]
    assert record["where"] == "image|last" and record["model"] == "tiny"
    np.testing.assert_allclose(json.loads(record["norms"]), direction.norms, rtol=1e-5)
    once = directions.find("means", *states(), S.projector.out)
    directions.write(once, path)
    assert directions.read(path).layers == ()


DAMAGE = {
    "missing record": (lambda r: {"format": r["format"]}, "no record of site, layers, where, kind"),
    "no metadata": (lambda r: None, "no record of format, site"),
    "another format": (lambda r: r | {"format": "mllm_jax direction 9"}, "expected 'mllm_jax dire"),
    "unknown site": (lambda r: r | {"site": "lm.resid_pots"}, "lm.resid_post"),
    "latents": (lambda r: r | {"site": "lm.resid_post.latents"}, "one vector for each token"),
    "heads": (lambda r: r | {"site": "lm.attn.heads"}, "one vector for each token"),
    "too few layers": (lambda r: r | {"layers": "[1]"}, "2 vectors for layers"),
    "a layer twice": (lambda r: r | {"layers": "[1, 1]"}, "listed once"),
    "layers of text": (lambda r: r | {"layers": '["1", "3"]'}, "not a list of numbers"),
    "layers in parts": (lambda r: r | {"layers": "[1.5, 3]"}, "not a list of numbers"),
    "no JSON": (lambda r: r | {"layers": "1, 3"}, "not a list of numbers|Extra data"),
    "other norms": (lambda r: r | {"norms": "[1.0, 2.0]"}, "do not have the norms"),
    "unknown tokens": (lambda r: r | {"where": "pictures"}, "unknown token kind"),
    "tokens of a file": (lambda r: r | {"where": "@/etc/mask.npy"}, "no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_does_not_fit_is_refused_in_one_line(name, tmp_path):
    change, message = DAMAGE[name]
    path = tmp_path / "d.safetensors"
    directions.write(made(), path)
    with safetensors.safe_open(path, "np") as opened:
        record = opened.metadata()
    safetensors.numpy.save_file({"vectors": made().vectors}, path, change(record))
    with pytest.raises(ValueError, match=message) as error:
        directions.read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_other_tensors_other_files_and_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    directions.write(made(), path)
    with safetensors.safe_open(path, "np") as opened:
        record = opened.metadata()
    safetensors.numpy.save_file({"v": made().vectors}, path, record)
    with pytest.raises(ValueError, match="holds v, expected 'vectors' alone"):
        directions.read(path)
    safetensors.numpy.save_file({"vectors": np.full((2, D), np.nan, np.float32)}, path, record)
    with pytest.raises(ValueError, match="not finite|must be finite"):
        directions.read(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or altered"):
        directions.read(path)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        directions.write(made(), tmp_path / "d.npy")
    with pytest.raises(FileNotFoundError):
        directions.read(tmp_path / "none.safetensors")


def test_a_direction_of_another_width_or_depth_is_refused_by_the_pass(tiny_model, make_batch):
    vectors = np.ones((1, D + 1), np.float32)
    for direction, message in [
        (directions.Direction(S.lm.resid_post, (1,), vectors), "does not fit; the site is"),
        (directions.Direction(S.lm.resid_post, (9,), vectors[:, 1:]), "layer 9 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            mj.run(tiny_model, make_batch(), direction.edit())


WRONG = {
    "kind": (lambda a, b: directions.find("mean", a, b, HERE), "kind='mean' is not one of means"),
    "width": (lambda a, b: directions.find("means", a, b[:, 1:], HERE), "unequal L or D"),
    "no pairs": (lambda a, b: directions.find("component", a, b[1:], HERE), "component takes pairs"),
    "one vector": (lambda a, b: directions.find("means", a[0], b[0], HERE), "states are"),
    "none": (lambda a, b: directions.find("means", a[:0], b, HERE), "one or more examples"),
    "nan": (lambda a, b: directions.find("means", a * np.nan, b, HERE), "must be finite"),
    "an empty row": (
        lambda a, b: directions.find("means", a, np.append(b, np.zeros((1, D)), 0), HERE),
        "negative.12. is a state of zeros: leave out rows that pad a batch",
    ),
    "the same, but for rounding": (
        lambda a, b: directions.find("means", a, a[::-1].copy(), HERE), "do not differ",
    ),
    "the same": (lambda a, b: directions.find("means", a, a, HERE), "do not differ"),
    "no layer": (
        lambda a, b: directions.find("means", a, b, S.lm.resid_post),
        r"of one layer: name it, as lm.resid_post\[12\]",
    ),
    "units": (lambda a, b: directions.find("means", a, b, S.lm.resid_post[2, :5]), "layers alone"),
    "from the end": (lambda a, b: directions.find("means", a, b, S.lm.resid_post[-1]), "from 0"),
    "open": (lambda a, b: directions.find("means", a, b, S.lm.resid_post[2:]), "counted from 0"),
    "layers": (lambda a, b: directions.find("means", a, b, S.lm.resid_post[[1, 2]]), "1 vectors"),
    "site": (lambda a, b: directions.find("means", a, b, S.lm.attn.heads[1]), "one vector for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_states_that_make_no_direction_are_refused(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(*states())
