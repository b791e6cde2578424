"""Checkpoints of training: Orbax stores the arrays, and a record their dependencies.

A folder holds `checkpoint.json`, the record of the dependencies, and `steps/N`, the arrays after
step N as written by Orbax. The record contains the step and the digest of each of its files. It is
replaced once Orbax has finished a step, and only then are other steps removed. A process that is
killed at any moment therefore leaves a complete checkpoint, the new or the previous one.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mllm_jax.sharding import hosts
from mllm_jax.store import files, fingerprints
from mllm_jax.store.resumable import ResumableStore

_DISK_ERROR = re.compile(r": ([^:]+) \[os_error_code=")


class Checkpoint(ResumableStore):
    """The newest state of a training run, with the dependencies of a `mllm_jax.store.Store`.

    All processes save and load together, each its own shards of the arrays.
    """

    def __init__(
        self, folder: str | pathlib.Path | None, *, restart: bool = False, **parts: Any
    ) -> None:
        """Set the folder and compute the fingerprints of the dependencies.

        Args:
          folder: The folder of the checkpoint; None stores nothing.
          restart: Whether to remove an existing checkpoint.
          **parts: The dependencies of the training, as in `Store`.
        """
        path = None if folder is None else pathlib.Path(folder) / "checkpoint.json"
        super().__init__(path, parts)
        self._digests: dict[str, str] = {}
        if restart and self.path is not None:
            files.remove(self.path)
            self._remove_steps(but=None)

    def find(self) -> bool:
        """Return whether there is a checkpoint to `load`, after a check of its dependencies.

        Raises:
          ValueError: It has other dependencies, or its record is damaged.
        """
        if self.path is None or not hosts.broadcast_from_primary(self.path.exists()):
            return False
        record = files.parse_json_object(self.path, self.path.read_text("utf-8", "replace"))
        try:
            self._check(record)
            self._digests = dict(record["digests"])
        except (KeyError, TypeError) as error:
            raise files.damaged_error(self.path, error) from error
        return True

    def load(self, like: Any) -> Any:
        """Return the arrays of the checkpoint that `find` found.

        Args:
          like: A pytree of arrays with the shardings of the loaded ones; `...` in place of an array
            is not read.

        Returns:
          The same pytree with the saved values.

        Raises:
          ValueError: A file is missing or its bytes have changed.
        """
        assert self.path is not None
        step = self._step(self._kept[0])
        self._refuse_damaged(step)
        leaves, structure = jax.tree.flatten(like)
        wanted = {str(number): _abstract(leaf) for number, leaf in enumerate(leaves)}
        try:
            with _quiet():
                loaded = ocp.load(step, wanted)
        except Exception as error:  # Orbax raises many kinds of errors for changed files
            raise files.damaged_error(step, error) from error
        return jax.tree.unflatten(structure, [loaded[name] for name in wanted])

    def save(self, tree: Any) -> None:
        """Replace the checkpoint by a pytree of arrays and the number of finished steps.

        Raises:
          OSError: A file could not be written; the previous checkpoint is kept.
        """
        if self.path is None:
            return
        step = self._step(self.done)
        if hosts.is_primary():
            with files.naming_path(step):
                step.parent.mkdir(parents=True, exist_ok=True)
                files.record_in_journal(step.parent)
        arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree))}
        with files.naming_path(step), _quiet():
            try:
                ocp.save(step, arrays, overwrite=True)
            except ValueError as error:  # TensorStore's name for errors of the disk
                if reason := _DISK_ERROR.search(str(error)):
                    raise OSError(reason[1]) from error
                raise
        if hosts.is_primary():
            with files.naming_path(step):
                digests = _digests(step)
            files.atomic_json(self.path, self._record() | {"digests": digests})
            self._remove_steps(but=step)

    def _step(self, number: int) -> pathlib.Path:
        assert self.path is not None
        return self.path.absolute().parent / "steps" / str(number)

    def _remove_steps(self, but: pathlib.Path | None) -> None:
        """Remove all steps but one, and the remains of steps of killed processes."""
        folder = self._step(0).parent
        if not (hosts.is_primary() and folder.is_dir()):
            return
        for path in folder.iterdir():
            if path != but:
                shutil.rmtree(path, ignore_errors=True)
        if but is None:
            folder.rmdir()

    def _refuse_damaged(self, step: pathlib.Path) -> None:
        names, changed = sorted(self._digests), -1
        if hosts.is_primary():  # all processes then raise the same
            written = _digests(step)
            changed = next(
                (n for n, name in enumerate(names) if written.get(name) != self._digests[name]), -1
            )
        changed = hosts.broadcast_from_primary(changed)
        if changed >= 0 or not names:
            name = names[changed] if names else ""
            raise files.damaged_error(step / name, "its bytes have changed")


def _abstract(leaf: Any) -> Any:
    if leaf is ...:
        return ocp.PLACEHOLDER
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digests(step: pathlib.Path) -> dict[str, str]:
    """Return the digest of each file of a step, by its path in the step's folder."""
    return {
        str(path.relative_to(step)): fingerprints.file(path) for path in fingerprints.files(step)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging the stack trace of an error that is raised as one line."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
