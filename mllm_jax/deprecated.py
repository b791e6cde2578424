"""Names that have moved: the old ones keep working for one release, with a DeprecationWarning.

`MODULES` and `MEMBERS` map old names to new ones. Importing an old module, or reading it as an
attribute of its package, gives a module that reads its members from their new places. Nothing is
imported before an old name is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

MODULES = {
    "mllm_jax.axes": "mllm_jax.typing",
    "mllm_jax.narrow": "mllm_jax.numerics.indexing",
    "mllm_jax.precision": "mllm_jax.numerics.precision",
    "mllm_jax.products": "mllm_jax.numerics.products",
    "mllm_jax.workdir": "mllm_jax.store",
    "mllm_jax.interventions.run": "mllm_jax.passes.run",
    "mllm_jax.interventions.sweep": "mllm_jax.passes.sweep",
    "mllm_jax.interventions.reduce": "mllm_jax.passes.reduce",
    "mllm_jax.interventions.compiles": "mllm_jax.passes.compiles",
    "mllm_jax.interventions.trunk": "mllm_jax.passes.clean_pass",
    "mllm_jax.evaluation.generate": "mllm_jax.passes.generate",
    "mllm_jax.evaluation.score": "mllm_jax.passes.score",
    "mllm_jax.sharding.plan": "mllm_jax.planning.plan",
    "mllm_jax.sharding.programs": "mllm_jax.planning.programs",
    "mllm_jax.sharding.chips": "mllm_jax.planning.chips",
    "mllm_jax.sharding.hlo": "mllm_jax.planning.hlo",
    "mllm_jax.sharding.work": "mllm_jax.planning.work",
    "mllm_jax.sharding.split": "mllm_jax.sharding.collectives",
    "mllm_jax.models.llama": "mllm_jax.models.decoder",
    "mllm_jax.models.llava": "mllm_jax.families.llava.model",
    "mllm_jax.models.llava_next": "mllm_jax.families.llava_next.model",
    "mllm_jax.models.instructblip": "mllm_jax.families.instructblip.model",
    "mllm_jax.data.processor": "mllm_jax.processors.processor",
    "mllm_jax.data.pictures": "mllm_jax.processors.pictures",
    "mllm_jax.data.prompts": "mllm_jax.processors.prompts",
    "mllm_jax.data.image_processors": "mllm_jax.processors.image_processors",
    "mllm_jax.data.clip": "mllm_jax.processors.clip",
    "mllm_jax.data.rows": "mllm_jax.processors.rows",
    "mllm_jax.data.templates": "mllm_jax.processors.template_sandbox",
    "mllm_jax.data.files": "mllm_jax.files",
    "mllm_jax.data.instructblip": "mllm_jax.families.instructblip.processor",
    "mllm_jax.checkpoints.load": "mllm_jax.loading.load",
    "mllm_jax.checkpoints.save": "mllm_jax.loading.save",
    "mllm_jax.checkpoints.adapters": "mllm_jax.loading.adapters",
    "mllm_jax.checkpoints.embedded": "mllm_jax.loading.embedded",
    "mllm_jax.checkpoints.clip": "mllm_jax.loading.clip",
    "mllm_jax.checkpoints.settings": "mllm_jax.loading.settings",
    "mllm_jax.checkpoints.sources": "mllm_jax.loading.sources",
    "mllm_jax.checkpoints.files": "mllm_jax.files",
    "mllm_jax.checkpoints.tables": "mllm_jax.checkpoints.keys",
    "mllm_jax.checkpoints.architectures": "mllm_jax.families",
    "mllm_jax.checkpoints.released": "mllm_jax.families",
    "mllm_jax.checkpoints.config": "mllm_jax.families.llava.config",
    "mllm_jax.checkpoints.original": "mllm_jax.families.llava.original",
    "mllm_jax.checkpoints.instructblip": "mllm_jax.families.instructblip.config",
    "mllm_jax.store.made": "mllm_jax.store.resumable",
    "mllm_jax.store.rows": "mllm_jax.store.row_store",
}
MEMBERS = {
    "mllm_jax.interventions.run.bind": "mllm_jax.interventions.binding.bind",
    "mllm_jax.interventions.trunk.Trunk": "mllm_jax.passes.clean_pass.CleanPass",
    "mllm_jax.interventions.trunk.grow": "mllm_jax.passes.clean_pass.compute_clean_pass",
    "mllm_jax.interventions.trunk.whole": "mllm_jax.passes.clean_pass.without_sharing",
    "mllm_jax.narrow.at": "mllm_jax.numerics.indexing.index_without_upcast",
    "mllm_jax.narrow.numbers": "mllm_jax.numerics.indexing.layer_indices",
    "mllm_jax.sharding.plan.largest": "mllm_jax.planning.search.largest_that_fits",
    "mllm_jax.sharding.plan.smallest": "mllm_jax.planning.search.smallest_topology",
    "mllm_jax.sharding.plan.compiler": "mllm_jax.planning.compilation.has_tpu_compiler",
    "mllm_jax.sharding.plan.devices": "mllm_jax.planning.compilation.topology_devices",
    "mllm_jax.sharding.programs.model": "mllm_jax.planning.programs.abstract_model",
    "mllm_jax.sharding.programs.batch": "mllm_jax.planning.programs.abstract_batch",
    "mllm_jax.sharding.programs.asked": "mllm_jax.planning.programs.study_captures",
    "mllm_jax.sharding.split.pick": "mllm_jax.sharding.collectives.take_along_vocabulary",
    "mllm_jax.sharding.split.take": "mllm_jax.sharding.collectives.take_image_tokens",
    "mllm_jax.checkpoints.architectures.Architecture": "mllm_jax.families.base.Family",
    "mllm_jax.checkpoints.architectures.BY_TYPE": "mllm_jax.families.FAMILIES",
    "mllm_jax.checkpoints.instructblip.table": "mllm_jax.families.instructblip.keys.key_table",
    "mllm_jax.checkpoints.load.read_whole": "mllm_jax.loading.load.read_network",
    "mllm_jax.checkpoints.tables.canonical": "mllm_jax.families.llava.keys.canonical_key",
    "mllm_jax.checkpoints.tables.llava": "mllm_jax.families.llava.keys.key_table",
    "mllm_jax.data.domains.own": "mllm_jax.data.domains.load_user_domains",
    "mllm_jax.data.prompts.ChatTemplate": "mllm_jax.processors.chat_template.ChatTemplate",
    "mllm_jax.data.prompts.answer_ids": "mllm_jax.processors.tokenizers.answer_ids",
    "mllm_jax.data.prompts.encode": "mllm_jax.processors.tokenizers.encode",
    "mllm_jax.data.prompts.read": "mllm_jax.processors.prompts.parse_prompts",
    "mllm_jax.data.prompts.read_tokenizer": "mllm_jax.processors.tokenizers.read_tokenizer",
    "mllm_jax.data.image_processors.prepare": "mllm_jax.processors.image_processors.preprocess",
    "mllm_jax.data.image_processors.squared": "mllm_jax.processors.image_processors.pad_to_square",
    "mllm_jax.store.made.Made": "mllm_jax.store.resumable.ResumableStore",
    "mllm_jax.store.rows.Rows": "mllm_jax.store.row_store.RowStore",
    "mllm_jax.models.llama.Llama": "mllm_jax.models.decoder.Decoder",
    "mllm_jax.models.llama.LlamaConfig": "mllm_jax.models.decoder.DecoderConfig",
    "mllm_jax.models.llava.Batch": "mllm_jax.batch.Batch",
    "mllm_jax.tokens.all": "mllm_jax.tokens.every",
}


def install() -> None:
    """Make old modules importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MODULES`."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of an old module, None for any other name."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Let the module read its members from their new places."""
        _warn(module.__name__, MODULES[module.__name__])
        vars(module)["__getattr__"] = functools.partial(member, module.__name__)


def member(module: str, name: str, stacklevel: int = 1) -> Any:
    """Return the member of a module that had an old name.

    Partially applied to the name of a module, it is the `__getattr__` of that module.

    Args:
      module: The module.
      name: The old name.
      stacklevel: The number of frames between this call and the line that reads the name.

    Raises:
      AttributeError: The module has no such name.
    """
    path = f"{module}.{name}"
    if path in MEMBERS:
        _warn(path, MEMBERS[path], stacklevel)
        owner, _, new = MEMBERS[path].rpartition(".")
        return getattr(importlib.import_module(owner), new)
    if path in MODULES:
        _warn(path, MODULES[path], stacklevel)
        old = types.ModuleType(path)
        vars(old)["__getattr__"] = functools.partial(member, path)
        return old
    if module in MODULES and not name.startswith("__"):
        return getattr(importlib.import_module(MODULES[module]), name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _warn(old: str, new: str, stacklevel: int = 1) -> None:
    """Warn at the line that uses an old name, without the frames of an import."""
    warnings.warn(
        f"{old} is now {new}; the old name will be removed in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 2,
    )
