"""Towers and projectors alone: weights of transformers in them, and their tensors at our sites."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax import sites
from mllm_jax.checkpoints import keys
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.tap import Taps
from tests.helpers import hf


def transfer(
    build: Callable[[], nnx.Module],
    table: Iterable[keys.Row],
    network: hf.torch.nn.Module,
    prefix: str = "",
    is_unused: Callable[[str], bool] = lambda key: False,
) -> nnx.Module:
    """Our module with the weights of a network; every tensor must find its place.

    Args:
      build: Makes our module.
      table: Its key table, with "ours" before our paths.
      network: Theirs.
      prefix: Of its keys in the table.
      is_unused: Of keys that we do not read.
    """
    abstract = nnx.eval_shape(build)

    def name(path) -> str:
        path = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return f"ours.{path}"

    shapes = {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
    theirs = {prefix + k: v.numpy() for k, v in network.state_dict().items()}
    slots = keys.slots(shapes, table)
    keys.check({key: array.shape for key, array in theirs.items()}, slots, is_unused)
    arrays = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for slot in slots:
        arrays[slot.path][... if slot.layer is None else slot.layer] = slot.ours(theirs[slot.key])
        back = slot.transform.hf(slot.ours(theirs[slot.key]))
        number, count = slot.part
        np.testing.assert_array_equal(back, np.split(theirs[slot.key], count)[number])
    assert all(np.isfinite(array).all() for array in arrays.values())
    return jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays[name(path)]), abstract)


def keep(site: sites.Site, tokens: np.ndarray) -> BoundCapture:
    """A capture of a whole site, in all layers."""
    return BoundCapture(
        form="keep", site=site, by=None, k=0, count=0, single=not site.stacked, slots=None,
        order=None, absent=None, units=None, tokens=np.ones_like(tokens),
        kind=np.zeros(tokens.shape, np.int8), on=None, rows=np.ones(1, bool), readers=None,
    )  # fmt: skip


def run(module: nnx.Module, names: Iterable[str], tokens: np.ndarray, *inputs, call=None):
    """What a module returns, and its tensors at sites, compiled as a whole.

    Args:
      module: A tower or projector.
      names: The sites.
      tokens: True for tokens, bool[I, P].
      inputs: Of the module.
      call: (module, *inputs, tap) in place of the module itself.
    """
    names = list(names)

    @jax.jit
    def compiled(module, *inputs):
        taps = Taps((), {name: keep(sites.get(name), tokens) for name in names})
        tap = taps.module(names[0].split(".")[0])
        out = (call or (lambda module, *rest: module(*rest)))(module, *inputs, tap)
        return out, taps.captured

    out, captured = compiled(module, *inputs)
    return np.asarray(out), {name: np.asarray(array) for name, array in captured.items()}


def hooked(
    network: hf.torch.nn.Module, where: Mapping[str, str], *inputs, **named
) -> tuple[object, dict[str, list[np.ndarray]]]:
    """What a network returns, and what it computes at our sites: one array for each layer.

    Args:
      network: Theirs.
      where: site -> "module (input, output or weights)", with {i} for the layer; of several names,
        those that the network has.
      inputs: Of the network.
      named: Further inputs.
    """
    found, hooks = collections.defaultdict(list), []
    for site, text in where.items():
        for path, read in re.findall(r"(\S+) \((\w+)\)", text):
            pattern = re.compile(re.escape(path).replace(r"\{i\}", r"\d+"))

            def hook(module, args, kwargs, out, site=site, read=read):
                found[site].append(hf.READ[read](args, kwargs, out).numpy())

            for name, module in network.named_modules():
                if pattern.fullmatch(name):
                    hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    with hf.torch.no_grad():
        out = network(*inputs, **named)
    for each in hooks:
        each.remove()
    assert set(found) == set(where)
    return out, found


def assert_close(got: np.ndarray, want: np.ndarray, what: str, atol: float = 1e-5) -> None:
    """Assert that arrays are equal within an absolute bound, and not zero."""
    assert np.abs(want).max() > 0.1, f"{what}: a reference of zeros proves nothing"
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    far = np.abs(got - want).max() / max(1, np.abs(want).max())
    assert far <= atol, f"{what}: further from transformers than {atol}: {far}"
