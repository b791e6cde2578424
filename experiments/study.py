"""What every binary shares: the flags, and one clear line when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from mllm_jax.data import domains
from mllm_jax.workdir import Workdir

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; a killed run continues there.")
EXPECTED = (ValueError, KeyError, OSError, FloatingPointError, ImportError)


def domains_of(config, split: str) -> dict[str, domains.Domain]:
    """The domains of a config: the embedded ones, or the user's own where `paths` names some."""
    if config.paths:
        return domains.own(config.paths, split)
    return domains.embedded(split, domains=tuple(config.domains) or None)


def main(run: Callable) -> None:
    """Runs `run(config, workdir)` from the command line.

    Errors of input or machine end the program with one line and status 1.
    """

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        try:
            run(CONFIG.value, Workdir(WORKDIR.value, CONFIG.value.to_dict()))
        except EXPECTED as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            sys.exit(f"error: {text}")

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(start)
