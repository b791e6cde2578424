"""mllm_jax: open up LLaVA-style multimodal language models in JAX.

A forward pass is a pure function of (model, batch, edits), and what you want back is reduced
where it is computed. Start with `load`, `run` and the edits below; sites are in
`mllm_jax.sites`, token kinds in `mllm_jax.tokens`.
"""

from mllm_jax import deprecated, sites, tokens
from mllm_jax.interventions.captures import keep, lens, mass, mean, stats
from mllm_jax.interventions.edits import (
    ablate,
    add,
    call,
    knockout,
    patch,
    per_step,
    project_out,
    replace,
    scale,
)
from mllm_jax.loading.load import load, read_projector
from mllm_jax.loading.save import save_hf, write_projector
from mllm_jax.passes.compiles import compiles
from mllm_jax.passes.generate import generate
from mllm_jax.passes.reduce import reduce
from mllm_jax.passes.run import run
from mllm_jax.passes.score import score
from mllm_jax.passes.sweep import stack, sweep
from mllm_jax.planning.plan import plan
from mllm_jax.sharding.mesh import mesh

__version__ = "0.1.0"

deprecated.install()

__all__ = [
    "__version__",
    "ablate",
    "add",
    "call",
    "compiles",
    "generate",
    "keep",
    "knockout",
    "lens",
    "load",
    "mass",
    "mean",
    "mesh",
    "patch",
    "per_step",
    "plan",
    "project_out",
    "read_projector",
    "reduce",
    "replace",
    "run",
    "save_hf",
    "scale",
    "score",
    "sites",
    "stack",
    "stats",
    "sweep",
    "tokens",
    "write_projector",
]
