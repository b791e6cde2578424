"""Many processes: how they find each other, who writes, and how they end together.

JAX does the rest: every process runs the same program on arrays that lie on the devices of all.
A single process does none of this.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed  # of the key-value store, which has no public name
from jax.experimental import multihost_utils

WAIT = 40  # seconds for all to come
_HEARTBEAT = 30  # seconds without a word, after which a process is taken for dead
_STATUS = 128 + signal.SIGTERM
_ERROR = "mllm_jax/error"
_joined = threading.Event()
_asked = threading.Event()


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Becomes one of several processes; to be called before JAX is used.

    When not all have come after WAIT seconds, this process ends with one line: JAX would end it
    with a stack trace.

    Args:
        coordinator: host:port of process 0. processes: how many. process: which is this. All None
            where JAX finds them out by itself: on TPU, Slurm, MPI.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    alone = threading.Timer(WAIT, _alone, (coordinator, processes))
    alone.daemon = True
    alone.start()
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=2 * WAIT,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_HEARTBEAT,
    )
    alone.cancel()
    _joined.set()
    _listener.start()
    atexit.register(part)


def _alone(coordinator: str | None, processes: int | None) -> None:
    _end(
        f"error: not all {processes or ''} processes came to {coordinator or 'the first'} within "
        f"{WAIT} s: start one on every host, all with the same flags but for --process"
    )


def _listen() -> None:
    """Ends this process when another one says that it failed."""
    try:
        said = distributed.global_state.client.blocking_key_value_get(_ERROR, 10**9)
    except Exception:  # all have ended well
        return
    who, _, text = said.partition(" ")
    if int(who) != distributed.global_state.process_id:
        _end(f"process {who} failed: {text}")


_listener = threading.Thread(target=_listen, daemon=True)


def _end(text: str) -> NoReturn:
    """At once: nobody comes to the barrier that JAX waits at when a process ends by itself."""
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def fail(text: str) -> NoReturn:
    """Ends this process, and with it all others, which show this line as well."""
    if not _joined.is_set():
        sys.exit(text)
    print(text, file=sys.stderr, flush=True)  # first: the others, once told, may end JAX here
    state = distributed.global_state
    state.client.key_value_set(_ERROR, f"{state.process_id} {text}")
    os._exit(1)


def count() -> int:
    """How many processes there are; does not start JAX's backend."""
    return distributed.global_state.num_processes or 1


def writes() -> bool:
    """Whether this process is the one that writes files."""
    return distributed.global_state.process_id == 0


def meet(name: str) -> None:
    """Waits until all are here: what process 0 wrote before, all can read after."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """What process 0 says of it, such as whether a file is there."""
    if count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def heed_sigterm() -> None:
    """From now on SIGTERM does not end this process where it stands, but where work is saved.

    With several processes JAX listens to it, and finds a step that all of them can reach.
    """
    if count() == 1:
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def leaving() -> bool:
    """Whether SIGTERM came: then save, and `leave`. To be asked by all processes alike."""
    if count() > 1:
        leaving.calls += 1
        return multihost_utils.reached_preemption_sync_point(leaving.calls)
    return _asked.is_set()


leaving.calls = 0


def part() -> None:
    """The end, where all processes have come to it; at the latest when Python ends."""
    if count() > 1:
        jax.distributed.shutdown()
        _listener.join(1)  # a thread that wakes while Python ends would abort the process


def leave(what: str) -> NoReturn:
    """Ends this process after SIGTERM; all that is done is saved."""
    part()
    print(f"{what}: stopped by SIGTERM; start again to continue", file=sys.stderr, flush=True)
    sys.exit(_STATUS)
