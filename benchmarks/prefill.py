"""Run a clean forward pass, and its matrix products with weights alone.

The products of attention count as overhead, so a share of 0.7 is at least 70 % of the machine's
rate of matrix products.
"""

from __future__ import annotations

import jax
import numpy as np

import mllm_jax as mj
from benchmarks import harness
from benchmarks.work import Work
from mllm_jax.interventions import tap


def sides(work: Work):
    """Return the sides of this library by name."""
    model, batch = work.model, work.batch(rows=work.fields["pictures"])
    vision, (B, T) = work.size.config.vision, batch.ids.shape
    key = jax.random.key(0)
    patches = jax.random.normal(key, (B, vision.grid**2 + 1, vision.width))
    words = jax.random.normal(key, (B, T, work.size.config.lm.width))
    features = jax.jit(lambda model: model.features(batch, tap.Taps()))
    read = jax.jit(lambda m, x: m.read(x, batch.positions, tap.Taps())[0][:, -1])
    products = jax.jit(_products)
    return {
        harness.OURS: lambda: {"logits": np.asarray(mj.run(model, batch).logits)},
        "vision": harness.timed(features, model),
        "LM": harness.timed(read, model, words),
        "vision products": harness.timed(products, model.vision.layers, patches),
        "LM products": harness.timed(products, model.lm.layers, words),
    }


def _products(layers, x):
    """Compute all products of the layers with weights; unused ones are reduced to a maximum."""

    def step(x, layer):
        attn, mlp = layer.attn, layer.mlp
        side = [attn.k, attn.v, *([mlp.gate] if hasattr(mlp, "gate") else [])]
        y = x @ attn.q.kernel[...] @ attn.o.kernel[...]
        y = y @ mlp.up.kernel[...] @ mlp.down.kernel[...]
        return x + y, [(x @ linear.kernel[...]).max() for linear in side]

    return jax.lax.scan(step, x, layers)


def _share(parts: tuple[str, ...], whole: str):
    """Return the bound on the time of the products relative to the pass that contains them."""

    def value(series):
        return sum(series[f"{part} products"].seconds for part in parts) / series[whole].seconds

    return harness.Bound(f"products with weights / {whole}", value, least=0.7)


BENCHMARK = harness.Benchmark(
    name="prefill",
    about="a clean pass of vision, projector and LM to the logits of the last token",
    sides=sides,
    rivals=("hf_careful", "hf_compiled"),
    bounds=(
        _share(("vision", "LM"), harness.OURS),
        _share(("vision",), "vision"),
        _share(("LM",), "LM"),
    ),
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
