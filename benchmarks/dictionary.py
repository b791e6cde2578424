"""Ablate the latents of a sparse autoencoder one by one, and read the logits of the options."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import mllm_jax as mj
from benchmarks import harness, latents
from benchmarks.work import Work
from mllm_jax import sites as S
from mllm_jax.dictionaries.dictionary import Dictionary


def sides(work: Work):
    """Return the sides of this library by name."""
    model, options = work.model, work.inputs["options"]
    batch, width = work.batch(rows=work.fields["pictures"]), work.size.config.lm.width
    arrays = {name: jnp.asarray(a) for name, a in latents.weights(width).items()}
    dictionary = Dictionary(
        encoder=arrays["W_enc"], encoder_bias=arrays["b_enc"], decoder=arrays["W_dec"],
        decoder_bias=arrays["b_dec"], threshold=arrays["threshold"],
    )  # fmt: skip
    layer, count = work.fields["steered_layers"][0], len(work.inputs["layers"])
    splice = mj.splice(S.lm.resid_post[layer], dictionary)
    edits = [
        splice >> mj.ablate(S.lm.resid_post.latents[layer, latent])
        for latent in latents.edited(width, count)
    ]

    def metric(out):
        return out.logits[:, options]

    def ours():
        return {"logits": np.asarray(mj.sweep(metric, model, batch, edits))}

    return {harness.OURS: ours}


BENCHMARK = harness.Benchmark(
    name="dictionary",
    about="ablations of single latents at the middle layer, logits of four options",
    sides=sides,
    rivals=("hf_careful", "hf_ordinary"),
    bounds=(harness.faster("hf_careful", 2), harness.faster("hf_ordinary", 5)),
    pictures=1,
    eigen=True,
)

if __name__ == "__main__":
    harness.run(BENCHMARK)
