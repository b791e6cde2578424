"""What every binary shares: the flags, and one clear line when something is wrong."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mllm_jax import workdir as workdir_
from mllm_jax.data import domains, vqa
from mllm_jax.interventions import spec
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.tap import Taps

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
PARSE = {"edits": spec.parse, "captures": spec.parse_captures}
# What paper A reads: the split of its data sets, and the prompts.
VQA = {"train": ("train", "activation"), "test": ("val", "generation"), "lens": ("train", "lens")}
EXPECTED = (ValueError, KeyError, OSError, FloatingPointError, ImportError)


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
    return batch.replace(features=_features(model, batch.replace(processor=None)))


@jax.jit
def _features(model, batch):
    return model.features(batch, Taps())


def main(run: Callable, takes: Sequence[str] = ()) -> None:
    """Runs `run(config, workdir)` from the command line.

    Errors of input or machine end the program with one line and status 1.

    Args:
      takes: "edits" and "captures", where the study can use them: then `run` gets them by name,
        or None. A flag that the study does not take is refused.
    """

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        try:
            asked = _asked(takes)
            config = CONFIG.value.to_dict() | _records(asked)
            run(CONFIG.value, workdir_.Workdir(WORKDIR.value, config), **asked)
        except EXPECTED as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            sys.exit(f"error: {text}")

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(start)


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


def named(workdir: workdir_.Workdir) -> dict[str, dict[str, str]]:
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
    workdir_.atomic_npz(path, arrays | kinds)
