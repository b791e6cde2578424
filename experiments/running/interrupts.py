"""End the process with one line on Ctrl-C and SIGTERM, also during an import or a compilation."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

GRACE = 10  # seconds until a study must have saved its state
_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_graceful: dict[int, Callable[[], None]] = {}


def watch() -> None:
    """Let these signals end this process with one line instead of a traceback.

    Python runs a handler only between two bytecode instructions, which may be minutes apart.
    Therefore a thread that the signal wakes up ends the process.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _NAMES:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


def save_first(interrupt: Callable[[], None]) -> None:
    """Let the study save its state before these signals end the process.

    Args:
      interrupt: Requests the end of the study on Ctrl-C; the study handles SIGTERM itself. A second
        Ctrl-C, or GRACE seconds, end the process at once. Files are never written partially.
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
        f"stopped by {_NAMES[number]}: finished work is saved; start again with the same "
        "flags to continue\n"
    )
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), text.encode())
    os._exit(128 + number)
