"""The lock of a workdir, which admits one run at a time."""

from __future__ import annotations

import fcntl
import os
import pathlib
import socket
import sys

NAME = ".lock"
_held: list[int] = []  # open files of locks, which are released when the process ends


def acquire(workdir: str | os.PathLike) -> None:
    """Lock a workdir until this process ends.

    Raises:
      ValueError: Another run has the lock.
      OSError: The folder cannot be created or written.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise ValueError(
            f"--workdir={workdir}: another run ({owner or 'which has just started'}) uses it; "
            "wait until it ends, or choose another folder"
        ) from None
    except OSError as error:  # a file system without locks
        print(f"warning: {folder} cannot be locked ({error.strerror}): start only one run in it",
              file=sys.stderr)  # fmt: skip
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} of {socket.gethostname()}\n".encode())
    _held.append(handle)
