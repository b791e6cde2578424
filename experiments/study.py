"""What every binary shares: the flags, and one clear line when something is wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mllm_jax import products, store
from mllm_jax.data import batching, domains, vqa
from mllm_jax.data import features as features_
from mllm_jax.interventions import spec
from mllm_jax.interventions.edits import Edits
from mllm_jax.sharding import hosts, mesh

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; a killed run continues there.")
EDITS = flags.DEFINE_string(
    "edits", None, "Edits of every pass: 'ablate lm.mlp.act[12,@neurons.json] >> add ...'; all of "
    "the language is in mllm_jax/interventions/spec.py.",
)  # fmt: skip
CAPTURES = flags.DEFINE_string(
    "captures", None, "What to bring back as well, into captures/*.npz of the workdir: "
    "'fire=stats lm.mlp.act by=kind; ...'.",
)  # fmt: skip
MESH = flags.DEFINE_string(
    "mesh", None, "The devices to run on: 'data=2,model=4', also 'fsdp='; see mj.mesh. By default "
    "one, or all with several processes, the batch spread over them.",
)  # fmt: skip
COORDINATOR = flags.DEFINE_string(
    "coordinator", os.environ.get("JAX_COORDINATOR_ADDRESS"), "host:port of process 0."
)
PROCESSES = flags.DEFINE_string(
    "processes", os.environ.get("JAX_NUM_PROCESSES"), "How many processes run this study together; "
    "'auto' where JAX knows it: on TPU, Slurm, MPI.",
)  # fmt: skip
PROCESS = flags.DEFINE_integer(
    "process", os.environ.get("JAX_PROCESS_ID"), "Which of them this is, from 0."
)
PARSE = {"edits": spec.parse, "captures": spec.parse_captures}
# What paper A reads: the split of its data sets, and the prompts.
VQA = {"train": ("train", "activation"), "test": ("val", "generation"), "lens": ("train", "lens")}
EXPECTED = (ValueError, KeyError, OSError, FloatingPointError, ImportError)
_AXES = "data", "model", "fsdp"


def domains_of(config, split: str) -> dict[str, domains.Domain]:
    """The domains of a config: data sets of paper A, the user's own by `paths`, or the embedded.

    Args:
        split: "train" or "test"; of paper A also "lens". They differ in their prompts there.
    """
    if config.get("vqa"):
        return _vqa(config, *VQA[split])
    if config.paths:
        return domains.own(config.paths, split)
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


def with_features(model, batch, edits: Edits | None = None):
    """The batch with its pictures read, so that passes over it leave the vision tower out.

    As it is, if an edit is in the tower.
    """
    if any(edit.address.site.module == "vision" for edit in edits or ()):
        return batch
    with mesh.on(model):
        features = features_.encode(model, mesh.place(batch.replace(processor=None)))
        return batch.replace(features=mesh.home(features))


def main(run: Callable, takes: Sequence[str] = (), *, eigen: bool = False) -> None:
    """Runs `run(config, workdir)` from the command line.

    Errors of input or machine end the program with one line and status 1.

    Args:
      takes: "edits" and "captures", where the study can use them: then `run` gets them by name,
        or None. A flag that the study does not take is refused.
      eigen: whether Eigen multiplies its matrices on CPUs, see `products`.
    """

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        try:
            _join()
            asked = _asked(takes)
            config = CONFIG.value.to_dict() | _records(asked)
            with _on_mesh():
                run(CONFIG.value, store.Workdir(WORKDIR.value, config), **asked)
            hosts.part()
        except EXPECTED as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            hosts.fail(f"error: {text}")
        except Exception as error:
            if hosts.count() == 1:
                raise
            traceback.print_exc()  # here; the others, who wait for this one, show one line
            hosts.fail(f"error: {type(error).__name__}: {error}")

    if eigen:
        products.prefer_eigen()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(start, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """The flags as absl reads them; a field that the config does not have is one clear line."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        (reason,) = getattr(error.args[0], "args", error.args)
        name, *near = str(reason).splitlines()
        field = name.strip("'")
        sys.exit(" ".join([f"error: the config has no field '{field}'; it lists them.", *near]))


def _join() -> None:
    """Becomes one of several processes, if the flags say so; only the first one speaks."""
    if PROCESSES.value == "auto":
        hosts.join(None, None, None)
    elif PROCESSES.value is not None:
        if not PROCESSES.value.isdigit() or COORDINATOR.value is None or PROCESS.value is None:
            raise ValueError(
                f"--processes={PROCESSES.value}: it is a number, with --coordinator=host:port and "
                "--process=0 and so on, or 'auto'"
            )
        hosts.join(COORDINATOR.value, int(PROCESSES.value), PROCESS.value)
    hosts.heed_sigterm()
    if not hosts.writes():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_mesh() -> contextlib.AbstractContextManager:
    """The mesh that the flags name, for `mj.load` to find."""
    if MESH.value is None and hosts.count() == 1:
        return contextlib.nullcontext()
    pairs = [part.split("=") for part in (MESH.value or "").split(",") if part]
    if any(len(p) != 2 or p[0] not in _AXES or not p[1].isdigit() for p in pairs):
        raise ValueError(f"--mesh={MESH.value}: it is written as data=2,model=4,fsdp=1")
    return jax.set_mesh(mesh.mesh(**{name: int(size) for name, size in pairs}))


def _asked(takes: Sequence[str]) -> dict[str, Any]:
    """What the flags say, by name."""
    asked: dict[str, Any] = dict.fromkeys(takes)
    for name, parse in PARSE.items():
        text = flags.FLAGS[name].value
        if text is not None and name not in takes:
            raise ValueError(f"this study takes no --{name}: it runs the model as it is")
        if text is not None:
            asked[name] = parse(text)
    return asked


def _records(asked: dict[str, Any]) -> dict[str, Any]:
    """Edits and captures as the config and the manifest hold them; the string may name files."""
    return {
        name: {"text": flags.FLAGS[name].value, "digest": spec.digest(of), "json": spec.to_json(of)}
        for name, of in asked.items()
        if of is not None
    }


def named(workdir: store.Workdir) -> dict[str, dict[str, str]]:
    """The edits and captures of a study as its results name them; the manifest has them whole."""
    return {
        name: {key: workdir.config[name][key] for key in ("text", "digest")}
        for name in PARSE
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
