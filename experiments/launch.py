"""Runs a study in several processes of this machine, to try out what a pod will do.

    python -m experiments.launch --processes=2 -- \
        python -m experiments.domain_neurons --config=configs/embedded.py:quick --workdir=DIR

When one process fails, all end, with its status; SIGTERM and Ctrl-C go to all. When none is left
to say why, as after SIGKILL to all, this one does. On a pod there is no need for it: start the
study on every host with `--processes=auto`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

GRACE = 20  # seconds for the others to end by themselves, when one has failed


def launch(command: list[str], count: int) -> int:
    """Starts the processes and waits for them; the status of the first that fails, or 0."""
    address = f"127.0.0.1:{_free_port()}"
    started = [_start(command, address, count, number) for number in range(count)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _signal(started, number))
    try:
        return _wait(started)
    finally:
        _signal(started, signal.SIGKILL)
        for process in started:
            for log in _logs(process):
                log.unlink(missing_ok=True)


def _start(command: list[str], address: str, count: int, number: int) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }
    if number:
        environment["TQDM_DISABLE"] = "1"
    # A group of its own: Ctrl-C comes through this process, and once.
    return subprocess.Popen(command, env=environment, process_group=0)


def _wait(started: list[subprocess.Popen]) -> int:
    while True:
        found = [process.poll() for process in started]
        if failed := [status for status in found if status]:
            break
        if None not in found:
            return 0
        time.sleep(0.1)
    end = time.monotonic() + GRACE
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        time.sleep(0.1)
    status = failed[0]
    if all((process.poll() or 0) < 0 for process in started):
        _explain(started)
    return status if status > 0 else 128 - status  # as a shell says it of a signal


def _explain(started: list[subprocess.Popen]) -> None:
    """One line where all were ended by signals; that which aborts does it because of another."""
    ended = [(p.returncode == -signal.SIGABRT, i) for i, p in enumerate(started)]
    aborted, number = min(ended)
    text = (
        f"error: process {number} was ended by {signal.Signals(-started[number].returncode).name}"
    )
    if aborted:
        words = " ".join(line for log in _logs(started[number]) for line in log.open())
        text += f" ({words[:200].strip()})"
    print(f"{text}: what was finished is saved; start again with the same flags to continue",
          file=sys.stderr)  # fmt: skip


def _logs(process: subprocess.Popen) -> list[pathlib.Path]:
    """What JAX's C++ code wrote to stderr in a process, see `hosts.initialize`."""
    return list(pathlib.Path(tempfile.gettempdir()).glob(f"mllm_jax-{process.pid}-*.log"))


def _signal(started: list[subprocess.Popen], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    asked = parser.parse_args()
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if not command or asked.processes < 1:
        parser.error("a command is needed after --, and one process or more")
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    sys.exit(launch(command, asked.processes))


if __name__ == "__main__":
    main()
