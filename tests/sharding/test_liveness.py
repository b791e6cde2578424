"""Processes hear of each other's end: three of them, played by one."""

from __future__ import annotations

import queue
import socket
import threading

import numpy as np
import pytest

from mllm_jax.sharding import hosts, liveness


@pytest.fixture
def three():
    """Monitors of three processes that are connected, and what each was told."""
    told = [queue.Queue() for _ in range(3)]
    monitors = [liveness.Monitor(i, lambda *failed, i=i: told[i].put(failed)) for i in range(3)]
    listener, address = liveness.listen("127.0.0.1")
    stranger = socket.create_connection(address[:2])
    stranger.sendall(b'["hello", 1, "a guess"]\n')
    accepting = threading.Thread(target=monitors[0].accept, args=(listener, address.token, 2))
    accepting.start()
    for monitor in monitors[1:]:
        monitor.connect(address)
    accepting.join(10)
    assert not accepting.is_alive() and stranger.recv(1) == b""  # it was sent away
    stranger.close()
    yield monitors, told
    for monitor in monitors:
        monitor.close()


def die(monitor: liveness.Monitor) -> None:
    """Its connections end as the kernel ends them, and it says nothing any more."""
    peers = list(monitor._peers.values())
    monitor._peers.clear()
    for peer in peers:
        peer.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("number", [1, 2])
def test_the_death_of_one_is_known_to_all(number, three):
    monitors, told = three
    die(monitors[number])
    for other in {0, 1, 2} - {number}:
        assert told[other].get(timeout=10) == (number, None)


def test_the_death_of_the_first_is_known_to_all(three):
    monitors, told = three
    die(monitors[0])
    assert told[1].get(timeout=10) == told[2].get(timeout=10) == (0, None)


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_fails_says_why(number, three):
    monitors, told = three
    monitors[number].report("the disk is full")
    for other in {0, 1, 2} - {number}:
        assert told[other].get(timeout=10) == (number, "the disk is full")
        assert told[other].empty()


def test_one_that_says_goodbye_is_not_missed(three):
    monitors, told = three
    monitors[1].close()
    die(monitors[1])
    with pytest.raises(queue.Empty):
        told[0].get(timeout=0.3)
    assert told[2].empty()


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([{"config": {"seed": 1}, "code": "a"}] * 2, None),
        ([{"config": {"seed": 2}, "code": "a"}], "process 1 differs from process 0 in config.seed:"),
        ([{"config": {"seed": 1}, "code": "a"}, {"config": {}, "code": "b"}],
         "process 2 differs from process 0 in code, config, config.seed: start all processes"),
        ([{"config": {"seed": 1, "more": [1, 2]}, "code": "a"}], "process 0 in config.more:"),
    ],
)  # fmt: skip
def test_processes_that_differ_are_named(others, says, monkeypatch):
    """The exchange is that of JAX; what is compared is ours."""
    parts = [{"config": {"seed": 1}, "code": "a"}, *others]
    texts = [hosts._encode_parts(part) for part in parts]
    size = max(map(len, texts))

    def allgather(value):
        if np.ndim(value) == 0:
            return np.array([len(text) for text in texts])
        assert bytes(value).rstrip() == texts[0] and len(value) == size
        return np.array([np.frombuffer(text.ljust(size), np.uint8) for text in texts])

    monkeypatch.setattr(hosts, "process_count", lambda: len(parts))
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", allgather)
    if says is None:
        hosts.require_same(**parts[0])
    else:
        with pytest.raises(ValueError, match=says):
            hosts.require_same(**parts[0])


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=r"--coordinator=127.*: process 0 cannot listen there"):
            hosts._check_port("127.0.0.1", port, f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("10.0.0.1", False), ("a", False)],
)
def test_processes_of_one_machine_are_known(host, local):
    assert hosts.is_loopback(host) == local
