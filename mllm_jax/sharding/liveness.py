"""Detect failed processes by a TCP connection from each process to process 0.

The kernel closes the connections of a process that dies, for whatever reason, so that the others
notice at once. A process that is merely stopped keeps its connection, and the others wait for it.
TCP keepalive detects a lost host. Messages are lines of JSON, `[kind, process, text]`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable
from typing import IO, Any, NamedTuple

CONNECT_TIMEOUT = 20  # seconds to connect to process 0
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 6}  # two minutes
_MAX_MESSAGE_BYTES = 4096  # the longest message

OnFailure = Callable[[int, str | None], None]


class Address(NamedTuple):
    """The address of process 0, and the token that authenticates other processes."""

    host: str
    port: int
    token: str


class Monitor:
    """Call `on_failure(process, text)` when another process fails.

    Args:
      process: The number of this process.
      on_failure: The callback, called in a thread; the text of a dead process is None.
    """

    def __init__(self, process: int, on_failure: OnFailure):
        self.process, self._on_failure = process, on_failure
        self._peers: dict[int, socket.socket] = {}
        self._closed = False

    def connect(self, address: Address) -> None:
        """Connect to process 0; every other process calls this once."""
        peer = socket.create_connection(address[:2], timeout=CONNECT_TIMEOUT)
        _send(peer, ["hello", self.process, address.token])
        self._follow(0, peer)

    def accept(self, listener: socket.socket, token: str, count: int) -> None:
        """Wait in process 0 until `count` others have connected, and close the listener."""
        with listener:
            while len(self._peers) < count:
                peer, _ = listener.accept()
                peer.settimeout(CONNECT_TIMEOUT)
                reader = peer.makefile("rb")
                kind, process, text = _receive(reader) or ("", -1, "")
                if kind == "hello" and secrets.compare_digest(str(text), token):
                    self._follow(process, peer, reader)
                else:
                    peer.close()  # not a process of this run

    def report(self, text: str) -> None:
        """Tell the others that this process fails, and why."""
        self._broadcast(["failed", self.process, text[: _MAX_MESSAGE_BYTES // 8]])

    def close(self) -> None:
        """Announce a normal end; from now on the end of another process is not a failure."""
        self._closed = True
        self._broadcast(["done", self.process, ""])

    def _broadcast(self, message: list[Any], skip: int | None = None) -> None:
        for process, peer in list(self._peers.items()):
            if process != skip:
                _send(peer, message)

    def _follow(self, process: int, peer: socket.socket, reader: IO[bytes] | None = None) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[process] = peer
        arguments = process, reader or peer.makefile("rb")
        threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def _watch(self, process: int, reader: IO[bytes]) -> None:
        """Wait for a message or the end of a connection; process 0 forwards messages."""
        message = _receive(reader)
        if self._closed or (message and message[0] == "done"):
            return
        kind, failed, text = message or ("lost", process, None)
        if self.process == 0:
            self._broadcast([kind, failed, text], skip=process)
        self._on_failure(failed, text)


def listen(host: str) -> tuple[socket.socket, Address]:
    """Listen in process 0 on a free port, and return the listener and its address."""
    listener = socket.create_server((host, 0))
    listener.settimeout(CONNECT_TIMEOUT)
    return listener, Address(host, listener.getsockname()[1], secrets.token_hex(16))


def own_address() -> str:
    """Return the address by which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel picks the interface
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def _send(peer: socket.socket, message: list[Any]) -> None:
    with contextlib.suppress(OSError):  # the reader of the connection detects the loss
        peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(reader: IO[bytes]) -> list[Any] | None:
    """Return the next message; None at the end of the connection."""
    try:
        line = reader.readline(_MAX_MESSAGE_BYTES)
        return json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
