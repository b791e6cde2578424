"""The command line of every program of `experiments`: its flags, and one line for each error.

JAX is not imported here, so that a wrong command line is refused at once.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import app, flags

from mllm_jax.interventions import grammar

MAX_LENGTH = 390  # characters of an error
# Errors of input or machine, which need no traceback.
EXPECTED = (ValueError, KeyError, OSError, FloatingPointError, ImportError, MemoryError)
CHECKPOINT_FILES = "config.json", "adapter_config.json"


def run(main: Callable[[], None], check: Callable[[], None]) -> NoReturn:
    """Parse the flags of a program, check them and run it.

    An error ends the program with one line and status 1.

    Args:
      main: The program; it imports the library itself.
      check: Raises a ValueError or an OSError about the flags; it imports nothing heavy.
    """

    def check_all(arguments: list[str]) -> None:
        refuse_arguments(["", *arguments])
        check()

    run_with_arguments(lambda arguments: main(), check_all)


def run_with_arguments(
    main: Callable[[list[str]], None], check: Callable[[list[str]], None]
) -> NoReturn:
    """Run a program that takes arguments beside flags; see `run`.

    Args:
      main: The program, called with the arguments.
      check: Raises a ValueError or an OSError about the arguments and flags.
    """

    def start(argv: Sequence[str]) -> None:
        with one_line(sys.exit):
            check(list(argv[1:]))
            main(list(argv[1:]))

    app.run(start, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """Parse flags with absl, and end the program with one line if they are wrong."""
    logging.disable(logging.WARNING)  # absl only warns about what is an error here
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        exit_with(describe_error(error))
    finally:
        logging.disable(logging.NOTSET)


def describe_error(error: flags.Error) -> str:
    """Return the message of absl about wrong flags in the style of our other messages."""
    first, *_ = str(error).splitlines()
    return first.replace("Unknown command line flag '", "unknown flag '--").removeprefix("flag ")


def exit_with(message: str) -> NoReturn:
    """End the program with an error of one line."""
    sys.exit(f"error: {' '.join(message.split())[:MAX_LENGTH]}")


@contextlib.contextmanager
def one_line(fail: Callable[[str], object]) -> Iterator[None]:
    """Call `fail(line)` when an error is raised inside.

    The line of an unexpected error, a bug in the program, follows its traceback.
    """
    try:
        yield
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        trace = ""
        if not isinstance(error, EXPECTED) and "RESOURCE_EXHAUSTED" not in str(error):
            trace = traceback.format_exc()
            text = f"{type(error).__name__}: {text} (a bug in the program: please report it)"
        line = " ".join(str(text).split()) or type(error).__name__
        line = line if len(line) <= MAX_LENGTH else line[: MAX_LENGTH - 3] + "..."
        fail(f"{trace}error: {line}")


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raise a ValueError about arguments that are not flags."""
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")


def require_checkpoint(field: str, name: str, *, released: bool = False) -> None:
    """Raise a FileNotFoundError if a name is neither a checkpoint folder nor a hub id.

    Args:
      field: The flag or the field of a config that gives the name.
      name: The name.
      released: Whether it may be the name of a released model as well.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in CHECKPOINT_FILES):
            raise FileNotFoundError(f"{field}={name}: not a checkpoint: it has no config.json")
        return
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir()
    is_released_name = released and re.fullmatch(r"[\w.-]+", name)
    if path.exists() or not (is_hub_id or is_released_name):
        kinds = "a released model, " if released else ""
        raise FileNotFoundError(
            f"{field}={name}: neither {kinds}a folder with a checkpoint nor a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )


def require_path(field: str, path: str) -> None:
    """Raise a FileNotFoundError if a file or folder does not exist."""
    if not pathlib.Path(path).expanduser().exists():
        raise FileNotFoundError(f"{field}: {path} does not exist")


def refuse_file(flag: str, path: str | None) -> None:
    """Raise a NotADirectoryError if the path of a folder to be written is a file."""
    if path and pathlib.Path(path).exists() and not pathlib.Path(path).is_dir():
        raise NotADirectoryError(f"{flag}={path}: it is a file; give a folder")


def refuse_folder(flag: str, path: str | None) -> None:
    """Raise an IsADirectoryError if the path of a file to be written is a folder."""
    if path and pathlib.Path(path).is_dir():
        raise IsADirectoryError(f"{flag}={path}: it is a folder; give a file")


def check_items(edits: str | None, captures: str | None) -> None:
    """Check the text of --edits and --captures as far as possible without the model.

    Args:
      edits: The text of the edits, None for none.
      captures: The text of the captures, None for none.

    Raises:
      ValueError: A part cannot be parsed, or names a file that does not exist.
    """
    for name, text, check in (
        ("edits", edits, grammar.parse), ("captures", captures, grammar.parse_captures)
    ):  # fmt: skip
        if text is not None:
            with grammar.located(f"--{name}"):
                check(text)
