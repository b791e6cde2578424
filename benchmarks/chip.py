"""Measure what a chip can do, and count what a task asks of it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import mllm_jax as mj
from benchmarks import counts, finetune, finetune_lora, lens
from benchmarks.work import Work
from mllm_jax.planning import work as matrix_products
from mllm_jax.training import fit, losses, parts

TURNS = 16  # of a measured operation in one program


def default_device(device: jax.Device) -> contextlib.AbstractContextManager[Any]:
    """Return a context that computes on a device; empty for the default device.

    Programs of a context are compiled for it, also where it changes nothing.
    """
    is_default = device == jax.local_devices()[0]
    return contextlib.nullcontext() if is_default else jax.default_device(device)


def product_rate(side: int, dtype: str) -> float:
    """Measure the operations a second of products of two square matrices."""
    x = jnp.ones((side, side), dtype) / side

    @jax.jit
    def run(x):
        return jax.lax.fori_loop(0, TURNS, lambda _, y: y @ x, x)

    return 2 * side**3 * TURNS / _fastest(run, x)


def copy_rate(size: int) -> float:
    """Measure the bytes a second, read and written, of arithmetic on an array of a size."""
    x = jnp.zeros(size // 4, jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(x):
        # A barrier in each turn, or XLA would add all of them in one.
        return jax.lax.fori_loop(0, TURNS, lambda _, y: jax.lax.optimization_barrier(y + 1), x)

    return 2 * size * TURNS / _fastest(run, x)


def _fastest(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Return the least seconds of some runs, each of which reads what the one before returned."""
    seconds = []
    for _ in range(4):  # the first compiles
        start = time.perf_counter()
        x = jax.block_until_ready(run(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products(task: str, work: Work) -> float | None:
    """Count the operations of the matrix products that a task asks for, None where that is unclear.

    Those of attention are included. A sweep shares what it can, so that nothing says how many it
    must do; of decoding, see `decoded_bytes`.
    """
    batches = work.batches
    passes: dict[str, Callable[[Any], Any]] = {
        "prefill": lambda model: mj.run(model, batches[0]).logits,
        "counts": lambda model: mj.run(model, batches[0], None, counts.CAPTURES, logits="none"),
        "lens": lambda model: mj.run(model, batches[0], None, lens.CAPTURES, logits="none"),
    }
    if task in passes:
        return len(batches) * matrix_products.flops(passes[task], work.model)
    recipes = {"finetune": finetune.RECIPE, "finetune_lora": finetune_lora.RECIPE}
    if task in recipes:
        return len(batches) * _step_products(work, recipes[task])
    return None


def _step_products(work: Work, recipe: fit.Recipe) -> float:
    """Count the operations of the loss of a batch and its gradient."""
    model, batch = finetune.folded(work), finetune.folded_batches(work)[0]
    batch = finetune.labelled(work, batch)
    features = jax.eval_shape(finetune.features, model, batch)
    batch = batch.replace(features=jnp.zeros(features.shape, features.dtype), pixels=None)
    merge, trained, frozen = parts.partition(model, recipe.part, lora=recipe.lora)

    def loss(trained, frozen):
        return losses.answer_nll(merge.for_pass(trained, frozen), batch, remat=False)[0].sum()

    return matrix_products.flops(jax.value_and_grad(loss), trained, frozen)


def decoded_bytes(work: Work) -> int:
    """Count the bytes that a decoded token must read: layers, head and cache at its mean length."""
    lm = work.model.lm
    head = lm.embed if lm.config.tied else lm.head
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((lm.layers, lm.norm, head)))
    B, T = work.inputs["ids"].shape
    config, positions = work.size.config.lm, T + work.fields["steps"] / 2
    keys = config.layers * config.kv_heads * config.head_width * jnp.dtype(work.size.dtype).itemsize
    return weights + round(2 * B * positions * keys)
