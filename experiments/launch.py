"""Run a study in several processes on this machine, to test a run on a pod.

    python -m experiments.launch --processes=2 -- \
        python -m experiments.domain_neurons --config=configs/embedded.py:quick --workdir=DIR

If one process fails, all end with its status. SIGTERM and Ctrl-C are sent to all. If all processes
are killed, the launcher reports the reason. On a pod it is not needed: start the study on every
host with `--processes=auto`.
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

GRACE = 20  # seconds in which the other processes may end by themselves after a failure


def launch(command: list[str], count: int) -> int:
    """Start the processes and wait for them.

    Args:
      command: The command of each process.
      count: The number of processes.

    Returns:
      128 + the signal's number if a process was killed, else the status of the first that
      failed, or 0.
    """
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
    # In its own process group it receives Ctrl-C only once, through this process.
    return subprocess.Popen(command, env=environment, process_group=0)


def _wait(started: list[subprocess.Popen]) -> int:
    """Wait until all processes have ended, and return the exit status of the run."""
    while True:
        polled = [process.poll() for process in started]
        if failed := [status for status in polled if status]:
            break
        if None not in polled:
            return 0
        time.sleep(0.1)
    end = time.monotonic() + GRACE
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        time.sleep(0.1)
    statuses = [process.poll() or 0 for process in started]
    if all(status < 0 for status in statuses):
        _explain(started)
    # A killed process is the cause even if another ended first; an aborted process never is.
    killed = [status for status in statuses if status < 0 and status != -signal.SIGABRT]
    status = (killed or failed)[0]
    return status if status > 0 else 128 - status  # as a shell reports a signal


def _explain(started: list[subprocess.Popen]) -> None:
    """Print one line on why all processes were ended by signals.

    A process that aborts does so because another has ended.
    """
    ended = [(p.returncode == -signal.SIGABRT, i) for i, p in enumerate(started)]
    aborted, number = min(ended)
    text = (
        f"error: process {number} was ended by {signal.Signals(-started[number].returncode).name}"
    )
    if aborted:
        log = " ".join(path.read_text() for path in _logs(started[number]))
        text += f" ({' '.join(log.split())[:200]})"
    print(f"{text}: finished work is saved; start again with the same flags to continue",
          file=sys.stderr)  # fmt: skip


def _logs(process: subprocess.Popen) -> list[pathlib.Path]:
    """Return the log files of JAX's C++ code in a process, see `hosts.initialize`."""
    return list(pathlib.Path(tempfile.gettempdir()).glob(f"mllm_jax-{process.pid}-*.log"))


def _signal(started: list[subprocess.Popen], number: int) -> None:
    """Send a signal to the running processes."""
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
    parser.add_argument("--processes", type=int, default=2, help="the number of processes")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command of the study, after --"
    )
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or args.processes < 1:
        parser.error("give a command after --, and at least one process")
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    sys.exit(launch(command, args.processes))


if __name__ == "__main__":
    main()
