"""Many processes: how they find each other, who writes, and how they end together.

JAX does the rest: every process runs the same program on arrays that lie on the devices of all.
A single process does none of this.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllm_jax.sharding import liveness

CONNECT_TIMEOUT = 40  # seconds for all to come
_HEARTBEAT_TIMEOUT = (
    24 * 3600
)  # of JAX, which ends all when one is silent for so long: see `liveness`
_SHUTDOWN_TIMEOUT = 60  # seconds for all to come to the end
_CAUSE_DELAY = 1.0  # seconds after an error in which another process may turn out to be its cause
RESUME_HINT = "what was finished is saved; start again with the same flags to continue"
_preempted = threading.Event()
_exit_lock = threading.Lock()
_interrupted = threading.Event()


class _State:
    """Of a run of several processes."""

    process = 0
    process_count = 1
    local = False  # whether all are on this machine
    monitor: liveness.Monitor | None = None
    log: pathlib.Path | None = None


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Becomes one of several processes; to be called before JAX is used.

    When not all have come after WAIT seconds, this process ends with one line: JAX would end it
    with a stack trace. What JAX's C++ code writes to stderr, as when another process has died,
    goes to a file in the folder for temporary files, which a normal end removes.

    Args:
        coordinator: host:port of process 0.
        processes: how many.
        process: which is this. All None
            where JAX finds them out by itself: on TPU, Slurm, MPI.

    Raises:
        ValueError: the port is taken, or JAX cannot connect the processes.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, _, port = (coordinator or "").rpartition(":")
    _State.local = bool(host) and is_loopback(host)
    if coordinator and process == 0:
        _check_port(host, int(port), coordinator)
    _divert_stderr()
    alone = threading.Timer(CONNECT_TIMEOUT, _exit_unconnected, (coordinator, processes))
    alone.daemon = True
    alone.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=2 * CONNECT_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
            coordinator_bind_address=coordinator if _State.local else None,
        )
        _State.process, _State.count = jax.process_index(), jax.process_count()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processes cannot be connected: {reason}") from error
    alone.cancel()
    _start_monitor()
    atexit.register(shutdown)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")


def _check_port(host: str, port: int, coordinator: str) -> None:
    """JAX would end with a stack trace where another program listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host.strip("[]") if _State.local else "", port))
        except OSError as error:
            raise ValueError(
                f"--coordinator={coordinator}: process 0 cannot listen there "
                f"({error.strerror or error}); choose a free port"
            ) from error


def _divert_stderr() -> None:
    """Python goes on writing to stderr, and C++ code writes to a file."""
    handle, name = tempfile.mkstemp(prefix=f"mllm_jax-{os.getpid()}-", suffix=".log")
    _State.log = pathlib.Path(name)
    sys.stderr.flush()
    shown = os.dup(2)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stderr = os.fdopen(shown, "w", buffering=1, errors="backslashreplace")


def _start_monitor() -> None:
    """Starts the monitor: processes end together, whichever fails."""
    monitor = liveness.Monitor(_State.process, _exit_after_failure)
    listener, address = None, liveness.Address("", 0, "")
    if is_primary():
        listener, address = liveness.listen("127.0.0.1" if _State.local else liveness.own_address())
    sent = json.dumps(address).encode().ljust(256)
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8))
    try:
        if listener is not None:
            monitor.accept(listener, address.token, _State.count - 1)
        else:
            monitor.connect(liveness.Address(*json.loads(bytes(np.asarray(told)))))
    except OSError as error:
        raise ValueError(
            f"process {_State.process} cannot connect to process 0 ({error}): open the ports "
            "between the hosts"
        ) from error
    _State.monitor = monitor


def _exit_unconnected(coordinator: str | None, processes: int | None) -> None:
    _exit_now(
        f"error: not all {processes or ''} processes came to {coordinator or 'the first'} within "
        f"{CONNECT_TIMEOUT} s: start one on every host, all with the same flags but for --process"
    )


def _exit_after_failure(failed: int, text: str | None) -> None:
    """Ends this process because another failed; on one machine one of those left says so."""
    if _interrupted.is_set():
        _exit_now("", 128 + signal.SIGINT)
    said = f"process {failed} failed: {text}"
    if text is None:
        said = f"error: process {failed} was lost (killed, or its host failed): {RESUME_HINT}"
    _exit_now(said if _is_reporter(failed) else "")


def _is_reporter(failed: int | None = None) -> bool:
    """Whether this process says what concerns all: on one machine the first that is left."""
    return not _State.local or _State.process == (1 if failed == 0 else 0)


def _exit_now(text: str, status: int = 1, *, report: bool = False) -> NoReturn:
    """At once: nobody comes to the barrier that JAX waits at when a process ends by itself."""
    if not _exit_lock.acquire(blocking=False):
        threading.Event().wait()  # another thread of this process is about to end it
    if text:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{text}\n".encode())
    if report:
        _State.monitor.report(text.splitlines()[-1])
    _remove_log()
    os._exit(status)


def fail(text: str) -> NoReturn:
    """Ends this process, and with it all others, which say why: the last line of the text."""
    if _State.monitor is None:
        _remove_log()
        sys.exit(text)
    time.sleep(_CAUSE_DELAY)
    _exit_now(text, report=True)


def process_count() -> int:
    """How many processes there are; does not start JAX's backend."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Whether this process is the one that writes files."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all are here: what process 0 wrote before, all can read after."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_primary(value: int) -> int:
    """What process 0 says of it, such as whether a file is there."""
    if process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def require_same(**parts: Any) -> None:
    """Refuses processes that were started for different things.

    Args:
        parts: plain JSON values; of mappings, the fields that differ are named.

    Raises:
        ValueError: in every process, naming the first that differs from process 0 and in what.
    """
    if process_count() == 1:
        return
    text = _encode_parts(parts)
    size = int(multihost_utils.process_allgather(np.int64(len(text))).max())
    padded = np.frombuffer(text.ljust(size), np.uint8)
    all_parts = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
    first = all_parts[0]
    for process, other in enumerate(all_parts):
        if other != first:
            names = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")
            raise ValueError(
                f"process {process} differs from process 0 in {shown}: start all processes with "
                "the same flags, code and files"
            )


def _encode_parts(parts: Mapping[str, Any]) -> bytes:
    return json.dumps(_flatten(parts), sort_keys=True, default=str).encode()


def _flatten(parts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in parts.items():
        nested = isinstance(value, Mapping) and value
        found |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def handle_sigterm() -> None:
    """From now on SIGTERM does not end this process where it stands, but where work is saved.

    With several processes JAX listens to it, and finds a step that all of them can reach.
    """
    if process_count() == 1:
        signal.signal(signal.SIGTERM, lambda *_: _preempted.set())


def interrupt() -> None:
    """Asks this process, for Ctrl-C, to save and leave as for SIGTERM."""
    _interrupted.set()
    os.kill(os.getpid(), signal.SIGTERM)


def preemption_requested() -> bool:
    """Whether SIGTERM came: then save, and `leave`. To be asked by all processes alike."""
    if process_count() > 1:
        preemption_requested.calls += 1
        return multihost_utils.reached_preemption_sync_point(preemption_requested.calls)
    return _preempted.is_set()


preemption_requested.calls = 0


def shutdown() -> None:
    """The end, where all processes have come to it; at the latest when Python ends."""
    if _State.monitor is not None:
        monitor, _State.monitor = _State.monitor, None
        jax.distributed.shutdown()  # once all have come
        monitor.close()
        _remove_log()


def _remove_log() -> None:
    if _State.log is not None:
        _State.log.unlink(missing_ok=True)


def exit_preempted(what: str) -> NoReturn:
    """Ends this process after SIGTERM or Ctrl-C; all that is done is saved."""
    number = signal.SIGINT if _interrupted.is_set() else signal.SIGTERM
    cause = "Ctrl-C" if _interrupted.is_set() else "SIGTERM"
    speaks = _is_reporter() or process_count() == 1
    shutdown()
    if speaks and _exit_lock.acquire(blocking=False):
        print(f"{what}: stopped by {cause}: {RESUME_HINT}", file=sys.stderr, flush=True)
    sys.exit(128 + number)
