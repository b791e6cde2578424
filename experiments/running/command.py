"""The command line of every study: its flags and their checks.

This module does not import JAX. Flags, the config and its paths are checked before JAX is imported,
and the study itself is imported last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from experiments.running import agreement, cli, compiled, fields, interrupts, lock

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the results; a killed run continues there."
)
RESTART = flags.DEFINE_bool(
    "restart",
    False,
    "Remove the files of earlier runs of the study from the workdir, and start over.",
)
VERIFY = flags.DEFINE_bool(
    "verify", False, "Check the digests of all cached files of the embedded model and pictures."
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "The folder of compiled programs, which later runs reuse; by "
    "default in the cache of the library. Empty: none.",
)  # fmt: skip
EDITS = flags.DEFINE_string(
    "edits", None, "The edits of every pass: 'ablate lm.mlp.act[12,@neurons.json] >> add ...'; "
    "mllm_jax/interventions/spec.py describes the language.",
)  # fmt: skip
CAPTURES = flags.DEFINE_string(
    "captures", None, "Further captures, which are written to captures/*.npz of the workdir: "
    "'fire=stats lm.mlp.act by=kind; ...'.",
)  # fmt: skip
MESH = flags.DEFINE_string(
    "mesh", None, "The mesh of devices: 'data=2,model=4', also 'fsdp='; see mj.mesh. By default "
    "one device, or with several processes all devices, which share the rows of each batch.",
)  # fmt: skip
COORDINATOR = flags.DEFINE_string(
    "coordinator", os.environ.get("JAX_COORDINATOR_ADDRESS"), "host:port of process 0."
)
PROCESSES = flags.DEFINE_string(
    "processes", os.environ.get("JAX_NUM_PROCESSES"), "The number of processes of this run; 'auto' "
    "if JAX detects it: on TPU, Slurm and MPI.",
)  # fmt: skip
PROCESS = flags.DEFINE_integer(
    "process", os.environ.get("JAX_PROCESS_ID"), "The index of this process, from 0."
)
_AXES = "data", "model", "fsdp"
_SPECIAL_NAMES = {"model": ("embedded",), "projector": ("random",)}  # values that are not paths


def main(
    module: str,
    takes: Sequence[str] = (),
    *,
    eigen: bool = False,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Run `run(config, workdir)` of a module from the command line; does not return.

    Errors of input or machine end the program with one line and status 1.

    Args:
      module: The module of the study, which is imported after its flags are checked.
      takes: "edits" and "captures", if the study supports them; they are passed to `run` by name,
        None if the flag is not given. Without support, the flag is refused.
      eigen: Whether Eigen computes matrix products on CPUs, see `products`.
      rows: The fields of the config that hold a batch size, with the number of rows of each
        element. The number of data shards of the mesh must divide the number of rows.
    """
    interrupts.watch()
    start = functools.partial(_start, module, takes, eigen, rows or {})
    app.run(start, flags_parser=_parse)


def _start(
    module: str, takes: Sequence[str], eigen: bool, rows: Mapping[str, int], argv: Sequence[str]
) -> None:
    with cli.one_line(sys.exit):
        _check(argv, takes)
    with cli.one_line(sys.exit):
        from mllm_jax.numerics import products
        from mllm_jax.sharding import hosts

        if eigen:
            products.prefer_eigen()
        compiled.keep(COMPILATION_CACHE.value)
        items = _read_items(takes)
    with cli.one_line(hosts.fail):
        _initialize_process()
        interrupts.save_first(hosts.interrupt)
        if hosts.is_primary():
            lock.acquire(_workdir())
        if hosts.process_count() > 1:
            named = {"mesh": MESH.value, "workdir": str(_workdir().resolve())}
            hosts.require_same(
                study=module, flags=named | _record(items), **agreement.parts(CONFIG.value)
            )
        with _use_mesh() as mesh:
            _check_rows(rows, mesh)
            _run(importlib.import_module(module), items)
        hosts.shutdown()


def _run(study: Any, items: dict[str, Any]) -> None:
    """Run a study with its edits and captures."""
    from mllm_jax import store
    from mllm_jax.store import stamps

    if VERIFY.value:
        stamps.forget(store.cache_directory())
    config = CONFIG.value.to_dict() | _record(items)
    study.run(CONFIG.value, store.Workdir(_workdir(), config, restart=RESTART.value), **items)


def _workdir() -> pathlib.Path:
    """Return the workdir, which `_check` requires."""
    return pathlib.Path(WORKDIR.value or "")


def _parse(argv: Sequence[str]) -> list[str]:
    """Parse flags and config, and end the program with one line if they are wrong."""
    config = _config_argument(argv)
    try:
        path = pathlib.Path(config.split(":")[0])
        if config and not path.is_file():
            reason = "it is a folder" if path.is_dir() else "no such file"
            raise FileNotFoundError(reason)
        logging.disable(logging.WARNING)  # absl only warns about what is an error here
        return flags.FLAGS(argv)
    except AttributeError as error:  # an unknown field of the config
        (reason,) = getattr(error.args[0], "args", error.args) if error.args else ("",)
        name, *nearest = str(reason).splitlines()
        field = name.strip("'\"")
        text = " ".join(
            [f"the config has no field '{field}'; its file lists the fields.", *nearest]
        )
        if "get_config" in name:
            text = f"--config={config}: it defines no get_config()"
    except flags.Error as error:
        text = cli.describe_error(error)
        if "Error whilst parsing config file" in text:  # a traceback follows
            text = f"--config={config}: {str(error).splitlines()[-1]}"
    except Exception as error:  # raised by the config file
        *_, reason = traceback.format_exception_only(error)
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = str(error) if isinstance(error, ValueError | OSError) else reason
        text = f"--config={config}{line}: {reason}"
    finally:
        logging.disable(logging.NOTSET)
    cli.exit_with(text)


def _config_argument(argv: Sequence[str]) -> str:
    """Return the value of --config, which absl's errors about a config file do not contain."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            return value or following
    return ""


def _check(argv: Sequence[str], takes: Sequence[str]) -> None:
    """Check flags, config and paths as far as possible without the library.

    Raises:
      ValueError, OSError: The first error.
    """
    cli.refuse_arguments(argv)
    for name in ("config", "workdir"):
        if not flags.FLAGS[name].value and (name != "config" or not _config_argument(sys.argv)):
            raise ValueError(f"--{name} is missing: --config=FILE.py --workdir=FOLDER")
    if not hasattr(CONFIG.value, "to_dict"):
        file = _config_argument(sys.argv)
        raise ValueError(f"--config={file}: get_config() does not return a ConfigDict")
    for name in ("edits", "captures"):
        if flags.FLAGS[name].value is not None and name not in takes:
            raise ValueError(f"this study does not support --{name}; remove the flag")
    cli.check_items(EDITS.value, CAPTURES.value)
    cli.refuse_file("--workdir", WORKDIR.value)
    cli.refuse_file("--compilation_cache", COMPILATION_CACHE.value)
    _mesh_sizes()
    _check_processes()
    _check_paths(CONFIG.value)
    fields.check(CONFIG.value)


def _mesh_sizes() -> dict[str, int]:
    """Return the sizes of the axes that --mesh names."""
    pairs = [part.split("=") for part in (MESH.value or "").split(",") if part]
    wrong = [p for p in pairs if len(p) != 2 or p[0] not in _AXES or not p[1].isdigit()]
    names = [p[0] for p in pairs]
    if wrong or len(set(names)) < len(names) or (MESH.value is not None and not pairs):
        raise ValueError(f"--mesh={MESH.value}: write it as data=2,model=4,fsdp=1")
    if zero := [name for name, size in pairs if int(size) < 1]:
        raise ValueError(f"--mesh={MESH.value}: {zero[0]} must be at least 1")
    return {name: int(size) for name, size in pairs}


def _check_processes() -> None:
    """Check --processes, --process and --coordinator."""
    count, process, coordinator = PROCESSES.value, PROCESS.value, COORDINATOR.value
    if count == "auto":
        return
    if count is None:
        if process is not None or coordinator is not None:
            raise ValueError(
                "--process and --coordinator need --processes=N, the number of all processes"
            )
        return
    if not count.isdigit() or coordinator is None or process is None:
        raise ValueError(
            f"--processes={count}: give a number, with --coordinator=host:port and --process=0, "
            "1, ..., or 'auto'"
        )
    if int(count) < 1:
        raise ValueError(f"--processes={count}: it must be at least 1")
    if not 0 <= process < int(count):
        raise ValueError(
            f"--process={process}: with --processes={count} it must be 0 to {int(count) - 1}"
        )
    host, separator, port = coordinator.rpartition(":")
    if not (separator and host and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(
            f"--coordinator={coordinator}: write it as host:port, with a port of 1 to 65535"
        )


def _check_paths(config: Any) -> None:
    """Check that the checkpoints, files and folders of a config exist; hub ids are not checked."""
    for field in agreement.CHECKPOINTS:
        name = str(config.get(field) or "")
        if name and name not in _SPECIAL_NAMES.get(field, ()):
            cli.require_checkpoint(f"config.{field}", name)
    for field in agreement.FILES:
        path = str(agreement.at(config, field) or "")
        if path and path not in _SPECIAL_NAMES.get(field, ()):
            cli.require_path(f"config.{field}", path.split("{")[0] or ".")
    paths = config.get("paths") or ()
    for path in (paths,) if isinstance(paths, str) else paths:
        cli.require_path("config.paths", str(path))


def _read_items(takes: Sequence[str]) -> dict[str, Any]:
    """Return the edits and captures of the flags by name; None if a flag is not given."""
    from mllm_jax.interventions import spec

    parse = {"edits": spec.parse, "captures": spec.parse_captures}
    texts = {name: flags.FLAGS[name].value for name in takes}
    return {name: None if text is None else parse[name](text) for name, text in texts.items()}


def _record(items: dict[str, Any]) -> dict[str, Any]:
    """Return edits and captures as config and manifest record them; their text may name files."""
    from mllm_jax.interventions import spec

    return {
        name: {
            "text": flags.FLAGS[name].value,
            "digest": spec.digest(item),
            "json": spec.to_json(item),
        }
        for name, item in items.items()
        if item is not None
    }


def _initialize_process() -> None:
    """Join the processes that the flags name; only the first one writes to stdout."""
    from mllm_jax.sharding import hosts

    if PROCESSES.value == "auto":
        hosts.initialize(None, None, None)
    elif PROCESSES.value is not None:
        hosts.initialize(COORDINATOR.value, int(PROCESSES.value), PROCESS.value)
    hosts.handle_sigterm()
    if not hosts.is_primary():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _use_mesh() -> Iterator[Any]:
    """Activate the mesh of the flags for `mj.load`, and yield it; None on a single device."""
    import jax

    from mllm_jax.sharding import hosts, mesh

    if MESH.value is None and hosts.process_count() == 1:
        yield None
        return
    sizes = _mesh_sizes()
    created = mesh.mesh(sizes.get("data"), sizes.get("model", 1), fsdp=sizes.get("fsdp", 1))
    with jax.set_mesh(created):
        yield created


def _check_rows(rows: Mapping[str, int], mesh: Any) -> None:
    """Check that the mesh divides the batches, before anything is read."""
    if mesh is None:
        return
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for field, each in rows.items():
        size = agreement.at(CONFIG.value, field)
        if size * each > 1 and size * each % shards:
            raise ValueError(
                f"config.{field}={size}: batches of {size * each} rows cannot be divided into the "
                f"{shards} data shards of the mesh; make it a multiple of {shards}"
            )
