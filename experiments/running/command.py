"""The command line of every study: its flags, its checks, and one line when something is wrong.

This module does not import JAX: what is wrong with flags, config and paths is told before that, and
the study itself is imported last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from experiments.running import agreement, interrupts, lock
from mllm_jax.interventions import grammar

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; a killed run continues there.")
RESTART = flags.DEFINE_bool(
    "restart", False, "Remove what a study wrote in the workdir before, and start over."
)
VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Read the embedded model and pictures in the cache whole, and check their digests.",
)
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
EXPECTED = (ValueError, KeyError, OSError, FloatingPointError, ImportError, MemoryError)
LONGEST = 390  # characters of an error
_AXES = "data", "model", "fsdp"
_WORDS = {"model": ("embedded",), "projector": ("random",)}


def main(
    module: str,
    takes: Sequence[str] = (),
    *,
    eigen: bool = False,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Runs `run(config, workdir)` of a module from the command line; does not return.

    Errors of input or machine end the program with one line and status 1.

    Args:
      module: of the study, which is imported when its flags are found to be right.
      takes: "edits" and "captures", where the study can use them: then `run` gets them by name,
        or None. A flag that the study does not take is refused.
      eigen: whether Eigen multiplies its matrices on CPUs, see `products`.
      rows: the fields of the config that say how large a batch is, and how many rows one is: the
        mesh has to divide them.
    """
    interrupts.watch()
    start = functools.partial(_start, module, takes, eigen, rows or {})
    app.run(start, flags_parser=_parse)


def _start(
    module: str, takes: Sequence[str], eigen: bool, rows: Mapping[str, int], argv: Sequence[str]
) -> None:
    with one_line(sys.exit):
        _check(argv, takes)
    with one_line(sys.exit):
        from mllm_jax.numerics import products
        from mllm_jax.sharding import hosts

        if eigen:
            products.prefer_eigen()
        asked = _asked(takes)
    with one_line(hosts.fail):
        _join()
        interrupts.save_first(hosts.interrupt)
        if hosts.is_primary():
            lock.take(WORKDIR.value)
        if hosts.process_count() > 1:
            flags_ = {"mesh": MESH.value, "workdir": str(pathlib.Path(WORKDIR.value).resolve())}
            hosts.require_same(
                study=module, flags=flags_ | _records(asked), **agreement.parts(CONFIG.value)
            )
        with _on_mesh() as found:
            _check_rows(rows, found)
            study = importlib.import_module(module)
            _run(study, asked)
        hosts.shutdown()


def _run(study, asked: dict[str, Any]) -> None:
    from mllm_jax import store
    from mllm_jax.store import stamps

    if VERIFY.value:
        stamps.forget(store.cache_directory())
    config = CONFIG.value.to_dict() | _records(asked)
    study.run(CONFIG.value, store.Workdir(WORKDIR.value, config, restart=RESTART.value), **asked)


@contextlib.contextmanager
def one_line(fail: Callable[[str], Any]) -> Iterator[None]:
    """Ends the program by `fail(line)` when something goes wrong inside.

    A fault of the program itself shows its traceback before.
    """
    try:
        yield
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        shown = ""
        if not isinstance(error, EXPECTED) and "RESOURCE_EXHAUSTED" not in str(error):
            shown = traceback.format_exc()
            text = f"{type(error).__name__}: {text} (a fault of the program: please report it)"
        line = " ".join(str(text).split()) or type(error).__name__
        fail(f"{shown}error: {line if len(line) <= LONGEST else line[: LONGEST - 3] + '...'}")


def _parse(argv: Sequence[str]) -> list[str]:
    """The flags as absl reads them; what is wrong with them, or with the config, is one line."""
    config = _config_file(argv)
    try:
        path = pathlib.Path(config.split(":")[0])
        if config and not path.is_file():
            reason = "it is a folder" if path.is_dir() else "there is no such file"
            raise FileNotFoundError(reason)
        logging.disable(logging.WARNING)  # of absl, which warns of what is an error here
        return flags.FLAGS(argv)
    except AttributeError as error:  # a field that is not there
        (reason,) = getattr(error.args[0], "args", error.args) if error.args else ("",)
        name, *near = str(reason).splitlines()
        field = name.strip("'\"")
        text = " ".join([f"the config has no field '{field}'; it lists them.", *near])
        if "get_config" in name:
            text = f"--config={config}: it defines no get_config()"
    except flags.Error as error:
        first, *more = str(error).splitlines()
        if "Error whilst parsing config file" in first:  # a traceback follows
            first = f"--config={config}: {more[-1]}"
        text = first.replace("Unknown command line flag '", "unknown flag '--")
        text = text.removeprefix("flag ")
    except Exception as error:  # what a config file raises
        *_, reason = traceback.format_exception_only(error)
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = str(error) if isinstance(error, ValueError | OSError) else reason
        text = f"--config={config}{line}: {reason}"
    finally:
        logging.disable(logging.NOTSET)
    sys.exit(f"error: {' '.join(text.split())[:LONGEST]}")


def _config_file(argv: Sequence[str]) -> str:
    """As the command line names it: absl does not say it when it cannot be read."""
    for here, after in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = here.lstrip("-").partition("=")
        if name == "config":
            return value or after
    return ""


def _check(argv: Sequence[str], takes: Sequence[str]) -> None:
    """What can be known of flags, config and paths without the library.

    Raises:
      ValueError, OSError: the first thing that is wrong.
    """
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
    for name in ("config", "workdir"):
        if not flags.FLAGS[name].value and (name != "config" or not _config_file(sys.argv)):
            raise ValueError(f"--{name} is missing: --config=FILE.py --workdir=FOLDER")
    if not hasattr(CONFIG.value, "to_dict"):
        raise ValueError(f"--config={_config_file(sys.argv)}: get_config() returns no ConfigDict")
    for name in ("edits", "captures"):
        if flags.FLAGS[name].value is not None and name not in takes:
            raise ValueError(f"this study takes no --{name}: it runs the model as it is")
    check_items()
    if (folder := pathlib.Path(WORKDIR.value)).exists() and not folder.is_dir():
        raise NotADirectoryError(f"--workdir={folder}: it is a file; name a folder")
    _mesh_sizes()
    _check_processes()
    _check_paths(CONFIG.value)


def check_items() -> None:
    """Check the text of --edits and --captures as far as it can be without the model.

    Raises:
      ValueError: a part is not understood, or names a file that is not there.
    """
    for flag, check in ((EDITS, grammar.parse), (CAPTURES, grammar.parse_captures)):
        if flag.value is not None:
            with grammar.located(f"--{flag.name}"):
                check(flag.value)


def _mesh_sizes() -> dict[str, int]:
    pairs = [part.split("=") for part in (MESH.value or "").split(",") if part]
    wrong = [p for p in pairs if len(p) != 2 or p[0] not in _AXES or not p[1].isdigit()]
    names = [p[0] for p in pairs]
    if wrong or len(set(names)) < len(names) or (MESH.value is not None and not pairs):
        raise ValueError(f"--mesh={MESH.value}: it is written as data=2,model=4,fsdp=1")
    if zero := [name for name, size in pairs if int(size) < 1]:
        raise ValueError(f"--mesh={MESH.value}: {zero[0]} is at least 1")
    return {name: int(size) for name, size in pairs}


def _check_processes() -> None:
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
            f"--processes={count}: it is a number, with --coordinator=host:port and --process=0 "
            "and so on, or 'auto'"
        )
    if int(count) < 1:
        raise ValueError(f"--processes={count}: it is at least 1")
    if not 0 <= process < int(count):
        raise ValueError(
            f"--process={process}: with --processes={count} it is 0 to {int(count) - 1}"
        )
    host, separator, port = coordinator.rpartition(":")
    if not (separator and host and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(
            f"--coordinator={coordinator}: it is written as host:port, with a port of 1 to 65535"
        )


def _check_paths(config) -> None:
    """Checkpoints, files and folders of a config are there, if they can be told from hub ids."""
    for field in agreement.CHECKPOINTS:
        name = str(config.get(field) or "")
        if name and name not in _WORDS.get(field, ()):
            _check_checkpoint(f"config.{field}", name)
    for field in agreement.FILES:
        path = str(agreement.at(config, field) or "")
        if path and path not in _WORDS.get(field, ()):
            _require(f"config.{field}", path.split("{")[0] or ".")
    paths = config.get("paths") or ()
    for path in (paths,) if isinstance(paths, str) else paths:
        _require("config.paths", str(path))


def _check_checkpoint(field: str, name: str) -> None:
    path = pathlib.Path(name).expanduser()
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{field}={name}: no config.json in it, so no checkpoint")
    elif path.exists() or not hub_id:
        raise FileNotFoundError(
            f"{field}={name}: neither a folder with a checkpoint nor a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )


def _require(field: str, path: str) -> None:
    if not pathlib.Path(path).expanduser().exists():
        raise FileNotFoundError(f"{field}: {path} does not exist")


def _asked(takes: Sequence[str]) -> dict[str, Any]:
    """Edits and captures of the flags, by name; None where there are none."""
    from mllm_jax.interventions import spec

    parse = {"edits": spec.parse, "captures": spec.parse_captures}
    texts = {name: flags.FLAGS[name].value for name in takes}
    return {name: None if text is None else parse[name](text) for name, text in texts.items()}


def _records(asked: dict[str, Any]) -> dict[str, Any]:
    """Edits and captures as the config and the manifest hold them; the string may name files."""
    from mllm_jax.interventions import spec

    return {
        name: {"text": flags.FLAGS[name].value, "digest": spec.digest(of), "json": spec.to_json(of)}
        for name, of in asked.items()
        if of is not None
    }


def _join() -> None:
    """Becomes one of several processes, if the flags say so; only the first one speaks."""
    from mllm_jax.sharding import hosts

    if PROCESSES.value == "auto":
        hosts.initialize(None, None, None)
    elif PROCESSES.value is not None:
        hosts.initialize(COORDINATOR.value, int(PROCESSES.value), PROCESS.value)
    hosts.handle_sigterm()
    if not hosts.is_primary():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _on_mesh() -> Iterator[Any]:
    """The mesh that the flags name, for `mj.load` to find; None where there is one device."""
    import jax

    from mllm_jax.sharding import hosts, mesh

    if MESH.value is None and hosts.process_count() == 1:
        yield None
        return
    found = mesh.mesh(**_mesh_sizes())
    with jax.set_mesh(found):
        yield found


def _check_rows(rows: Mapping[str, int], mesh: Any) -> None:
    """Batches divide over the mesh; said before anything is read."""
    if mesh is None:
        return
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for field, each in rows.items():
        size = agreement.at(CONFIG.value, field)
        if size * each > 1 and size * each % parts:
            raise ValueError(
                f"config.{field}={size}: batches of {size * each} rows do not divide over the "
                f"{parts} data shards of the mesh; give it a multiple of {parts}"
            )
