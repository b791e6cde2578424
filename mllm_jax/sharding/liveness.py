"""Which of several processes live: one TCP connection from each of them to process 0.

The kernel closes the connections of a process that dies, however it dies, so that the others know
at once. A process that is stopped keeps them and is waited for. TCP keepalive finds a host that
is gone. What is sent are lines of JSON, `[kind, process, text]`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

CONNECT_TIMEOUT = 20  # seconds to connect to process 0
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 6}  # two minutes
_MAX_MESSAGE_BYTES = 4096  # bytes of a message at most

OnFailure = Callable[[int, str | None], None]


class Address(NamedTuple):
    """Where process 0 listens, and the word that the others show it."""

    host: str
    port: int
    token: str


class Monitor:
    """Calls `on_failure(process, text)` when another process fails; the text of a dead one is None.

    Args:
      process: the number of this one.
      on_failure: called in a thread.
    """

    def __init__(self, process: int, on_failure: OnFailure):
        self.process, self._on_failure = process, on_failure
        self._peers: dict[int, socket.socket] = {}
        self._closed = False

    def connect(self, address: Address) -> None:
        """Connects to process 0; every other process does it once."""
        peer = socket.create_connection(address[:2], timeout=CONNECT_TIMEOUT)
        _send(peer, ["hello", self.process, address.token])
        self._follow(0, peer)

    def accept(self, listener: socket.socket, token: str, count: int) -> None:
        """Waits in process 0 until `count` others have connected, and closes the listener."""
        with listener:
            while len(self._peers) < count:
                peer, _ = listener.accept()
                peer.settimeout(CONNECT_TIMEOUT)
                reader = peer.makefile("rb")
                kind, process, text = _receive(reader) or ("", -1, "")
                if kind == "hello" and secrets.compare_digest(str(text), token):
                    self._follow(process, peer, reader)
                else:
                    peer.close()  # a stranger

    def report(self, text: str) -> None:
        """Tells the others that this process fails, in a few words."""
        self._broadcast(["failed", self.process, text[: _MAX_MESSAGE_BYTES // 8]])

    def close(self) -> None:
        """Says goodbye: from now on nobody's end is a failure."""
        self._closed = True
        self._broadcast(["done", self.process, ""])

    def _broadcast(self, message: list, but: int | None = None) -> None:
        for process, peer in list(self._peers.items()):
            if process != but:
                _send(peer, message)

    def _follow(self, process: int, peer: socket.socket, reader=None) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[process] = peer
        arguments = process, reader or peer.makefile("rb")
        threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def _watch(self, process: int, reader) -> None:
        """Until the peer says goodbye or its connection ends; process 0 passes on what it hears."""
        message = _receive(reader)
        if self._closed or (message and message[0] == "done"):
            return
        kind, failed, text = message or ("lost", process, None)
        if self.process == 0:
            self._broadcast([kind, failed, text], but=process)
        self._on_failure(failed, text)


def listen(host: str) -> tuple[socket.socket, Address]:
    """A listener of process 0 on a free port of one of its addresses, and where it is."""
    listener = socket.create_server((host, 0))
    listener.settimeout(CONNECT_TIMEOUT)
    return listener, Address(host, listener.getsockname()[1], secrets.token_hex(16))


def own_address() -> str:
    """The address by which other hosts reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel picks the interface
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def _send(peer: socket.socket, message: list) -> None:
    with contextlib.suppress(OSError):  # it is gone, and its reader finds out
        peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(reader) -> list | None:
    """The next message; None where the connection ended."""
    try:
        line = reader.readline(_MAX_MESSAGE_BYTES)
        return json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
