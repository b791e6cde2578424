"""What the studies share: the examples of a config, and captures in files."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from experiments import agreement
from mllm_jax import store
from mllm_jax.data import batching, domains, vqa
from mllm_jax.data import features as features_
from mllm_jax.interventions.edits import Edits
from mllm_jax.sharding import mesh

# What paper A reads: the split of its data sets, and the prompts.
VQA = {"train": ("train", "activation"), "test": ("val", "generation"), "lens": ("train", "lens")}


def domains_of(config, split: str) -> dict[str, domains.Domain]:
    """The domains of a config: data sets of paper A, the user's own by `paths`, or the embedded.

    Args:
        split: "train" or "test"; of paper A also "lens". They differ in their prompts there.
    """
    if config.get("vqa"):
        return _vqa(config, *VQA[split])
    if config.paths:
        return domains.load_user_domains(config.paths, split)
    return domains.embedded(split, domains=tuple(config.domains) or None)


def examples_of(config, split: str, per_domain: int) -> list[domains.Example]:
    """The first examples of all domains in turn, so that neighbours in a batch differ in domain."""
    found = domains_of(config, split).values()
    return batching.interleave([list(itertools.islice(domain, per_domain)) for domain in found])


def _vqa(config, split: str, of: str) -> dict[str, domains.Domain]:
    names = tuple(config.domains) or vqa.NAMES
    where = {"root": config.vqa.root or None, "size": config.vqa.size}
    if config.vqa.manual:
        for name in names:
            vqa.build(name, config.vqa.manual, **where)
    return {name: vqa.load(name, split, model=config.vqa.model, of=of, **where) for name in names}


def claim(workdir: store.Workdir, config, model, processor, data: dict[str, Any]) -> None:
    """Refuses to go on with work of another model, of other data, files, code or versions.

    To be called once, before the first step of a study.

    Args:
        data: by name, the `content` of what the study reads.
    """
    workdir.claim(
        model=model, processor=processor, files=agreement.files(config), data=data,
        **agreement.made_by(),
    )  # fmt: skip


def content(examples: Iterable[Any]) -> list[str]:
    """Fingerprints of examples, or of pairs of an example and its question; one read at a time."""
    found = []
    for one in examples:
        example, *question = one if isinstance(one, tuple) else (one,)
        about = [example.id, example.domain, example.label, example.encoded, example.questions]
        found.append(store.fingerprint(about, question))
    return found


def with_features(model, batch, edits: Edits | None = None):
    """The batch with its pictures read, so that passes over it leave the vision tower out.

    As it is, if an edit is in the tower.
    """
    if any(edit.address.site.module == "vision" for edit in edits or ()):
        return batch
    with mesh.use_mesh_of(model):
        features = features_.encode_pictures(model, mesh.shard_batch(batch.replace(processor=None)))
        return batch.replace(features=mesh.gather_to_host(features))


def named(workdir: store.Workdir) -> dict[str, dict[str, str]]:
    """The edits and captures of a study as its results name them; the manifest has them whole."""
    return {
        name: {key: workdir.config[name][key] for key in ("text", "digest")}
        for name in ("edits", "captures")
        if name in workdir.config
    }


def write_captures(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Captures as one .npz: `name`, or `name/field` of those with fields, and `name/kinds`."""
    arrays = {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(found)
    }
    kinds = {f"{n}/kinds": np.array(f.kinds) for n, f in found.items() if hasattr(f, "kinds")}
    store.atomic_npz(path, arrays | kinds)
