"""mllm_jax: interpretability of LLaVA-style multimodal language models in JAX.

A forward pass is a pure function of (model, batch, edits), and results are reduced where they are
computed. Start with `load`, `run` and the edits below; sites are in
`mllm_jax.sites`, token kinds in `mllm_jax.tokens`. A name is imported when it is first read:
`import mllm_jax` alone does not load JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mllm_jax import deprecated
from mllm_jax.numerics import products

if TYPE_CHECKING:
    from mllm_jax import sites, tokens
    from mllm_jax.dictionaries.load import load_dictionary, write_dictionary
    from mllm_jax.interventions.captures import (
        attention,
        attention_map,
        bottom,
        distribution,
        histogram,
        keep,
        lens,
        mass,
        mean,
        rollout,
        sample,
        stats,
        top,
    )
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
        splice,
    )
    from mllm_jax.loading.load import load, read_projector
    from mllm_jax.loading.save import save_hf, write_projector
    from mllm_jax.passes.collect import collect, read_collection
    from mllm_jax.passes.compiles import compiles
    from mllm_jax.passes.generate import generate
    from mllm_jax.passes.reduce import reduce
    from mllm_jax.passes.run import run
    from mllm_jax.passes.score import score
    from mllm_jax.passes.sweep import stack, sweep
    from mllm_jax.planning.plan import plan
    from mllm_jax.sharding.mesh import mesh

__version__ = "0.1.0"

products.avoid_reductions()

_MEMBERS = {
    "mllm_jax.dictionaries.load": "load_dictionary write_dictionary",
    "mllm_jax.interventions.captures": (
        "attention attention_map bottom distribution histogram keep lens mass mean rollout sample "
        "stats top"
    ),
    "mllm_jax.interventions.edits": (
        "ablate add call knockout patch per_step project_out replace scale splice"
    ),
    "mllm_jax.loading.load": "load read_projector",
    "mllm_jax.loading.save": "save_hf write_projector",
    "mllm_jax.passes.collect": "collect read_collection",
    "mllm_jax.passes.compiles": "compiles",
    "mllm_jax.passes.generate": "generate",
    "mllm_jax.passes.reduce": "reduce",
    "mllm_jax.passes.run": "run",
    "mllm_jax.passes.score": "score",
    "mllm_jax.passes.sweep": "stack sweep",
    "mllm_jax.planning.plan": "plan",
    "mllm_jax.sharding.mesh": "mesh",
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MEMBERS.items() for name in names.split()}

deprecated.install()


if not TYPE_CHECKING:  # a type checker reads the imports above

    def __getattr__(name: str) -> Any:
        """Import a public name, or find one that has moved."""
        if name in ("sites", "tokens"):
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            return deprecated.member(__name__, name, stacklevel=2)
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "__version__",
    "ablate",
    "add",
    "attention",
    "attention_map",
    "bottom",
    "call",
    "collect",
    "compiles",
    "distribution",
    "generate",
    "histogram",
    "keep",
    "knockout",
    "lens",
    "load",
    "load_dictionary",
    "mass",
    "mean",
    "mesh",
    "patch",
    "per_step",
    "plan",
    "project_out",
    "read_collection",
    "read_projector",
    "reduce",
    "replace",
    "rollout",
    "run",
    "sample",
    "save_hf",
    "scale",
    "score",
    "sites",
    "splice",
    "stack",
    "stats",
    "sweep",
    "tokens",
    "top",
    "write_dictionary",
    "write_projector",
]
