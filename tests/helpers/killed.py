"""Training that is killed while it saves; see `test_checkpoint`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.store import files
from mllm_jax.training import checkpoint, fit

STEPS, KILLED = 6, 4  # the save after step KILLED is the last of the killed run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One vector a row."""

    x: np.ndarray

    def replace(self, processor=None):
        return self


def loss(model, batch, *, remat):
    return ((batch.x @ model["projector"]["kernel"] - 1) ** 2).mean(1), jnp.ones(len(batch.x))


def train(save=None):
    """Train a matrix that is large enough for its save to take some milliseconds."""
    rng = np.random.default_rng(0)
    model = {"projector": {"kernel": jnp.asarray(rng.normal(size=(512, 512)), jnp.float32)}}
    batches = [Batch(rng.normal(size=(4, 512)).astype(np.float32)) for _ in range(STEPS)]
    return fit.fit(model, batches, fit.Recipe(every=1), loss=loss, save=save)


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(steps: pathlib.Path) -> None:
    """Wait for the folder that Orbax writes to, before it gets its name."""
    while not any(path.name != str(KILLED) for path in steps.glob(f"{KILLED}*")):
        pass
    kill()


if __name__ == "__main__":
    folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
    if moment == "in Orbax":
        threading.Thread(target=kill_in_save, args=(folder / "steps",), daemon=True).start()
    record, remove, saves = files.atomic_json, checkpoint.Checkpoint._remove_steps, []

    def write(*args):
        saves.append(args)
        if moment == "before the record" and len(saves) == KILLED:
            kill()
        record(*args)

    def clear(self, but):
        if moment == "after the record" and len(saves) == KILLED:
            kill()
        remove(self, but)

    files.atomic_json, checkpoint.Checkpoint._remove_steps = write, clear
    train(folder)
