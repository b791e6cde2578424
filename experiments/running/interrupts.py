"""Ctrl-C and SIGTERM: one line, wherever they come; in an import and in a compiler, too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

GRACE = 10  # seconds for a study to come to where it saves
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_graceful: dict[int, Callable[[], None]] = {}


def watch() -> None:
    """From now on these signals end this process with one line instead of a traceback.

    Python runs a handler only between two of its instructions, which may be minutes apart: what
    ends the process is a thread, which the signal wakes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _NAMES:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


def save_first(interrupt: Callable[[], None]) -> None:
    """From now on a study saves before it ends.

    Args:
      interrupt: asks it to, for Ctrl-C; it hears SIGTERM by itself. When Ctrl-C comes again, or
        GRACE seconds have passed, the process ends as it is: files are never half written.
    """
    _graceful.update({signal.SIGINT: interrupt, signal.SIGTERM: lambda: None})


def _wait(reader: int) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number not in _NAMES:
            continue
        if number not in _graceful:
            _end(number)
        _graceful[number]()
        if number == signal.SIGINT:
            timer = threading.Timer(GRACE, _end, (number,))
            timer.daemon = True
            timer.start()
            del _graceful[number]


def _end(number: int) -> None:
    text = (
        f"stopped by {_NAMES[number]}: what was finished is saved; start again with the same "
        "flags to continue\n"
    )
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), text.encode())
    os._exit(128 + number)
