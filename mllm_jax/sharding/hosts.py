"""Run several processes: connect them, choose which one writes, and end them together.

JAX does the rest: every process runs the same program on arrays that are sharded over the devices
of all processes. With a single process these functions do nothing.
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

CONNECT_TIMEOUT = 40  # seconds until all processes have connected
_HEARTBEAT_TIMEOUT = (
    24 * 3600
)  # of JAX, which ends all processes if one is silent for this long; see `liveness`
_SHUTDOWN_TIMEOUT = 60  # seconds until all processes have reached the end
_CAUSE_DELAY = 1.0  # seconds in which another process may report that it caused an error
RESUME_HINT = "finished work is saved; start again with the same flags to continue"
_preempted = threading.Event()
_exit_lock = threading.Lock()
_interrupted = threading.Event()


class _State:
    """The state of this process in a run of several processes."""

    process = 0
    count = 1
    preemption_checks = 0
    local = False  # whether all processes run on this machine
    monitor: liveness.Monitor | None = None
    log: pathlib.Path | None = None


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join several processes; call this before JAX is used.

    If not all processes have connected after CONNECT_TIMEOUT seconds, this process ends with one
    line, where JAX would abort with a stack trace. Messages of JAX's C++ code to stderr, such as
    those about a lost process, go to a temporary file, which a normal end removes.

    Args:
      coordinator: host:port of process 0; None if JAX detects it (TPU, Slurm, MPI).
      processes: The number of processes; None if JAX detects it.
      process: The number of this process; None if JAX detects it.

    Raises:
      ValueError: The port is taken, or JAX cannot connect the processes.
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
    """Return whether a host name is a loopback address of this machine."""
    return host == "localhost" or host.startswith("127.") or host in ("::1", "[::1]")


def _check_port(host: str, port: int, coordinator: str) -> None:
    """Refuse a port on which another program listens; JAX would abort with a stack trace."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]") if _State.local else "", port))
        except OSError as error:
            raise ValueError(
                f"--coordinator={coordinator}: process 0 cannot listen there "
                f"({error.strerror or error}); choose a free port"
            ) from error


def _divert_stderr() -> None:
    """Redirect messages of C++ code on stderr to a file; Python keeps writing to stderr."""
    handle, name = tempfile.mkstemp(prefix=f"mllm_jax-{os.getpid()}-", suffix=".log")
    _State.log = pathlib.Path(name)
    sys.stderr.flush()
    terminal = os.dup(2)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")


def _start_monitor() -> None:
    """Start the monitor, which ends all processes when one of them fails."""
    monitor = liveness.Monitor(_State.process, _exit_after_failure)
    listener, address = None, liveness.Address("", 0, "")
    if is_primary():
        listener, address = liveness.listen("127.0.0.1" if _State.local else liveness.own_address())
    message = json.dumps(address).encode().ljust(256)
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(message, np.uint8))
    try:
        if listener is not None:
            monitor.accept(listener, address.token, _State.count - 1)
        else:
            monitor.connect(liveness.Address(*json.loads(bytes(np.asarray(received)))))
    except OSError as error:
        raise ValueError(
            f"process {_State.process} cannot connect to process 0 ({error}): open the ports "
            "between the hosts"
        ) from error
    _State.monitor = monitor


def _exit_unconnected(coordinator: str | None, processes: int | None) -> None:
    _exit_now(
        f"error: not all {processes or ''} processes connected to {coordinator or 'the first'} "
        f"within {CONNECT_TIMEOUT} s: start one on every host, with the same flags except --process"
    )


def _exit_after_failure(failed: int, text: str | None) -> None:
    """End this process because another failed; on one machine a single process reports it."""
    if _interrupted.is_set():
        _exit_now("", 128 + signal.SIGINT)
    message = f"process {failed} failed: {text}"
    if text is None:
        message = f"error: process {failed} was lost (killed, or its host failed): {RESUME_HINT}"
    _exit_now(message if _is_reporter(failed) else "")


def _is_reporter(failed: int | None = None) -> bool:
    """Return whether this process prints messages for all; on one machine only one does."""
    return not _State.local or _State.process == (1 if failed == 0 else 0)


def _exit_now(text: str, status: int = 1, *, report: bool = False) -> NoReturn:
    """Exit without the barrier at which JAX waits for all processes at a normal exit."""
    if not _exit_lock.acquire(blocking=False):
        threading.Event().wait()  # another thread is about to end this process
    if text:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{text}\n".encode())
    if report and _State.monitor is not None:
        _State.monitor.report(text.splitlines()[-1])
    _remove_log()
    os._exit(status)


def fail(text: str) -> NoReturn:
    """End this process and all others, which print the last line of the text."""
    if _State.monitor is None:
        _remove_log()
        sys.exit(text)
    time.sleep(_CAUSE_DELAY)
    _exit_now(text, report=True)


def process_count() -> int:
    """Return the number of processes, without starting JAX's backend."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Return whether this is the process that writes files."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes; afterwards they can read what process 0 wrote before."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_primary(value: int) -> int:
    """Return the value of process 0, such as whether a file exists."""
    if process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def require_same(**parts: Any) -> None:
    """Refuse processes that were started with different flags, code or files.

    Args:
      **parts: Plain JSON values that must be the same; a mapping is compared by fields.

    Raises:
      ValueError: A process differs from process 0; raised in every process.
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
    fields: dict[str, Any] = {}
    for name, value in parts.items():
        nested = isinstance(value, Mapping) and value
        fields |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return fields


def handle_sigterm() -> None:
    """Delay the effect of SIGTERM until work is saved, see `preemption_requested`.

    With several processes JAX handles the signal, and finds a step that all of them can reach.
    """
    if process_count() == 1:
        signal.signal(signal.SIGTERM, lambda *_: _preempted.set())


def interrupt() -> None:
    """Handle Ctrl-C like SIGTERM: save and exit."""
    _interrupted.set()
    os.kill(os.getpid(), signal.SIGTERM)


def preemption_requested() -> bool:
    """Return whether to save and call `exit_preempted`, because SIGTERM was received.

    All processes must call this equally often.
    """
    if process_count() > 1:
        _State.preemption_checks += 1
        return multihost_utils.reached_preemption_sync_point(_State.preemption_checks)
    return _preempted.is_set()


def shutdown() -> None:
    """Wait for all processes and disconnect; registered to run when Python exits."""
    if _State.monitor is not None:
        monitor, _State.monitor = _State.monitor, None
        jax.distributed.shutdown()  # waits for all processes
        monitor.close()
        _remove_log()


def _remove_log() -> None:
    if _State.log is not None:
        _State.log.unlink(missing_ok=True)


def exit_preempted(what: str) -> NoReturn:
    """End this process after SIGTERM or Ctrl-C; call it when finished work is saved."""
    number = signal.SIGINT if _interrupted.is_set() else signal.SIGTERM
    cause = "Ctrl-C" if _interrupted.is_set() else "SIGTERM"
    reports = _is_reporter() or process_count() == 1
    shutdown()
    if reports and _exit_lock.acquire(blocking=False):
        print(f"{what}: stopped by {cause}: {RESUME_HINT}", file=sys.stderr, flush=True)
    sys.exit(128 + number)
