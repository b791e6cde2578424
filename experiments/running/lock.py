"""One run at a time in a workdir."""

from __future__ import annotations

import fcntl
import os
import pathlib
import socket
import sys

NAME = ".lock"
_held: list[int] = []  # a lock lives as long as its file is open: until the process ends


def take(workdir: str | os.PathLike) -> None:
    """Keeps other runs out of a workdir until this process ends, however it ends.

    Raises:
      ValueError: another run is in it.
      OSError: the folder cannot be made or written.
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
            f"--workdir={workdir}: another run ({owner or 'which has just started'}) is at work "
            "in it; wait until it ends, or choose another folder"
        ) from None
    except OSError as error:  # a file system without locks
        print(f"warning: {folder} cannot be locked ({error.strerror}): start one run in it alone",
              file=sys.stderr)  # fmt: skip
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} of {socket.gethostname()}\n".encode())
    _held.append(handle)
