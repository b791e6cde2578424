"""A store that is damaged anywhere is refused, or gives what was written."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import store


def make(path, **parts) -> store.Store:
    return store.Store(path, **{"model": np.arange(3), "settings": {"a": 1, "b": 2}} | parts)


@pytest.fixture
def written(tmp_path):
    """A store of two items, and what is in it."""
    arrays = {"a": np.arange(5.0), "b": np.ones((2, 2), np.float32), "c": np.int64(7)}
    made = make(tmp_path / "x.npz")
    for item in ("one", "two"):
        made.add(item)
    made.write(arrays)
    return tmp_path / "x.npz", arrays


def test_flipped_and_missing_bytes(written):
    path, arrays = written
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    flips = [(i, content[i] ^ (1 << int(rng.integers(8)))) for i in range(len(content))]
    damaged = [content[:i] + bytes([byte]) + content[i + 1 :] for i, byte in flips]
    for changed in damaged + [content[:n] for n in range(0, len(content), 50)]:
        path.write_bytes(changed)
        try:
            found = make(path).read()
        except ValueError as error:
            assert "x.npz" in str(error) and len(str(error)) < 400 and "\n" not in str(error)
            refused += 1
        else:
            assert found.keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array)
    assert refused > 0.7 * len(content)


def test_what_differs_is_named(written):
    path, _ = written
    for parts, differs in (
        ({"model": np.arange(4)}, "model"),
        ({"settings": {"a": 1, "b": 3}}, r"settings \(b\)"),
        ({"settings": {"a": 1}, "more": 1}, r"more, settings \(b\)"),
    ):
        with pytest.raises(ValueError, match=f"x.npz was made .* it differs in {differs}; give"):
            make(path, **parts).read()
    np.savez(path, a=np.ones(2))  # no store
    with pytest.raises(ValueError, match="it differs in format"):
        make(path).read()


def test_it_goes_on_where_it_was_left(written):
    path, _ = written
    made = make(path)
    made.read()
    assert list(made.resume(iter(["one", "two", "three"]))) == ["three"] and made.done == 2
    for items, says in (
        (["one", "2", "three"], "differs in data"),
        (["one"], "contains 2, but only 1"),
    ):
        for form in (list, iter):
            made = make(path)
            made.read()
            with pytest.raises(ValueError, match=says):
                made.resume(form(items))
    assert make(path, restart=True).read() is None and not path.exists()


def test_dtypes_that_numpy_does_not_know(tmp_path):
    array = jnp.arange(4, dtype=jnp.bfloat16)
    make(tmp_path / "x.npz").write({"a": array})
    found = make(tmp_path / "x.npz").read()["a"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_nothing_is_kept_without_a_path():
    made = make(None)
    assert made.read() is None and list(made.resume(["one"])) == ["one"]
    made.add("one")
    made.write({"a": np.ones(1)})
    assert made.done == 1
