"""A fingerprint is that of content: nothing that matters is left out, and nothing else is in it."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.store import fingerprint, fingerprints
from tests.helpers import tiny

GLOBAL = 3


def reads_a_global(x):
    return x + GLOBAL


def calls_another(x):
    return reads_a_global(x)


def recursive(n):
    return 1 if n == 0 else n * recursive(n - 1)


def adds(n, more=0):
    return lambda x: x + n + more


class Callable:
    def __init__(self, n):
        self.n = n

    def __call__(self, x):
        return x + self.n

    @functools.cached_property
    def derived(self):
        return self.n + 1


class Mode(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass(frozen=True)
class Plain:
    a: int
    b: object = None


def differs(*values) -> bool:
    found = [fingerprint(value) for value in values]
    return len(set(found)) == len(found)


def test_arrays_and_values():
    x = np.arange(4.0)
    assert differs(
        {"a": x, "b": 1}, {"a": x, "b": 2}, {"a": x.reshape(2, 2), "b": 1}, {"c": x, "b": 1},
        {"a": x.astype(np.float32), "b": 1}, {"a": x, "b": True}, {"a": x, "b": 1.0},
        {"a": x, "b": "1"}, {"a": x, "b": None}, {"a": x}, [x, 1], (x, 1), x, x[:0], 0, [], (), {},
        None, "", b"", np.float64(0), np.array(["a", "b"]), np.array(["ab"]),
        np.array([1, "a"], object), np.array([1, "b"], object), Mode.A, Mode.B, Plain(1), Plain(2),
        Plain(1, x), jax.random.key(0), jax.random.key(1), {1, 2}, {1, 3},
    )  # fmt: skip
    assert fingerprint(jnp.arange(4.0)) == fingerprint(np.arange(4, dtype=np.float32))
    assert fingerprint(x[::-1][::-1]) == fingerprint(x)
    assert fingerprint(jnp.ones(3, jnp.bfloat16)) == fingerprint(jnp.ones(3, jnp.bfloat16))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_texts_do_not_run_into_each_other():
    assert differs(["a\nb", "c"], ["a", "b\nc"], ["a", "b", "c"], ["a\nb\nc"], [["a"], "b", "c"])
    assert differs(("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"))


def test_pictures():
    one, other = tiny.picture(1), tiny.picture(2)
    assert differs(one, other, one.convert("L"), one.resize((24, 25)))
    assert fingerprint(one) == fingerprint(one.copy())
    palettes = [PIL.Image.new("P", (2, 2)) for _ in range(2)]
    palettes[0].putpalette([1, 2, 3])
    palettes[1].putpalette([3, 2, 1])
    assert differs(*palettes)


def test_functions_are_known_by_their_code():
    one, two = (lambda out: out[0]), (lambda out: out[1])
    assert differs(
        one, two, adds(1), adds(2), adds(1, 1), functools.partial(adds, 1),
        functools.partial(adds, 2), functools.partial(one, 1), jax.tree_util.Partial(one, n=1),
        jax.tree_util.Partial(one, n=np.ones(2)), jax.tree_util.Partial(one, n=np.zeros(2)),
        lambda out, n=1: out[n], lambda out, n=2: out[n], lambda out, *, n=1: out[n],
        lambda out: (lambda x: x + 1)(out), lambda out: (lambda x: x + 2)(out),
        jax.jit(one), jax.jit(two), Callable(1), Callable(2), Callable(1).__call__,
        Callable(2).__call__, np.sin, np.cos, jnp.sin, jnp.cos, reads_a_global, recursive, len,
    )  # fmt: skip
    assert fingerprint(one) == fingerprint(lambda out: out[0])
    assert fingerprint(adds(1)) == fingerprint(adds(1))
    used = Callable(1)
    assert used.derived == 2 and fingerprint(used) == fingerprint(Callable(1))


def test_what_a_function_reads_is_part_of_it(monkeypatch):
    before = fingerprint(reads_a_global), fingerprint(calls_another), fingerprint(one_of_them)
    monkeypatch.setitem(globals(), "GLOBAL", 4)
    after = fingerprint(reads_a_global), fingerprint(calls_another), fingerprint(one_of_them)
    assert all(a != b for a, b in zip(before, after, strict=True))


one_of_them = functools.partial(calls_another)


def test_code_of_classes_is_part_of_their_objects():
    def made(body):
        return types.new_class("C", (), exec_body=lambda ns: ns.update(__call__=body))()

    assert differs(made(lambda self, x: x), made(lambda self, x: x + 1))


def test_a_cycle_ends():
    cycle: list = [1]
    cycle.append(cycle)
    other: list = [2]
    other.append(other)
    assert differs(cycle, other)


def test_every_weight_of_a_model_is_part_of_it(tiny_model):
    whole = fingerprint(tiny_model)
    leaves, shape = jax.tree.flatten(tiny_model)
    found = {whole}
    for i, leaf in enumerate(leaves):
        changed = np.array(leaf)
        changed.reshape(-1)[-1:] += 1
        found.add(fingerprint(jax.tree.unflatten(shape, [*leaves[:i], changed, *leaves[i + 1 :]])))
    assert len(found) == len(leaves) + 1 > 20
    assert fingerprint(jax.tree.map(np.array, tiny_model)) == whole


def test_edits_captures_and_batches(make_batch):
    def layer(i):
        return S.lm.mlp.act[i]

    assert differs(
        mj.ablate(layer(1)), mj.ablate(layer(2)), mj.ablate(layer(1), where=tok.image),
        mj.ablate(layer([1])), mj.scale(layer(1), 2.0), mj.scale(layer(1), 3.0),
        mj.ablate(layer(1)) >> mj.ablate(layer(2)), mj.ablate(layer(2)) >> mj.ablate(layer(1)),
        mj.call(layer(1), lambda x: x + 1), mj.call(layer(1), lambda x: x + 2),
    )  # fmt: skip
    assert differs(
        mj.stats(S.lm.mlp.act), mj.stats(S.lm.mlp.act, by=tok.kind), mj.mean(S.lm.mlp.act),
        mj.lens(S.lm.resid_post, k=3), mj.lens(S.lm.resid_post, k=4),
    )  # fmt: skip
    assert differs(make_batch(), make_batch(seed=1))
    assert fingerprint(make_batch()) == fingerprint(make_batch().replace(processor=object()))


def test_arrays_are_hashed_once_while_they_live(monkeypatch):
    count = []
    rows = fingerprints.mesh.iterate_rows
    monkeypatch.setattr(fingerprints.mesh, "iterate_rows", lambda x: count.append(1) or rows(x))
    x, y = jnp.arange(5.0), np.arange(5.0)
    first = fingerprint(x, y)
    assert fingerprint(x, y) == first and len(count) == 3  # one of NumPy may have changed
    y[0] = 1
    assert fingerprint(x, y) != first
    kept = len(fingerprints._arrays)
    del x
    assert len(fingerprints._arrays) < kept


def test_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = fingerprints.file(tmp_path)
    assert before == fingerprints.file(tmp_path)
    (tmp_path / "a" / "x").write_text("2")
    assert fingerprints.file(tmp_path) != before
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert fingerprints.file(tmp_path) != before


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_finds_the_same(seed):
    """Whatever the hashes of its strings are."""
    code = (
        "from tests.store.test_fingerprints import *; "
        "print(fingerprint({'b', 'a', 'c'}, {'x': 1, 'y': 2}, calls_another, adds(1), Mode.A, "
        "Callable(2), jnp.sin, lambda x: x in {'p', 'q', 'r'}, mj.ablate(S.lm.mlp.act[1])))"
    )
    environment = os.environ | {"PYTHONHASHSEED": seed}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == fingerprint(
        {"b", "a", "c"}, {"x": 1, "y": 2}, calls_another, adds(1), Mode.A, Callable(2), jnp.sin,
        lambda x: x in {"p", "q", "r"}, mj.ablate(S.lm.mlp.act[1]),
    )  # fmt: skip
