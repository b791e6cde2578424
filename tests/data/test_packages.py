"""Finding files in PyPI and Debian packages, without either."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import subprocess
import tarfile

import pytest

from mllm_jax.data import packages


def write_deb(path, files: dict[str, bytes], compression: str = "xz") -> str:
    """Writes a Debian package: an `ar` archive with a tar of the files; returns its sha256."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",  # of odd size: the next member is padded
        f"data.tar.{compression}": data.getvalue(),
    }
    packed = b"!<arch>\n"
    for name, content in members.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        packed += content + b"\n" * (len(content) % 2)
    path.write_bytes(packed)
    return hashlib.sha256(packed).hexdigest()


def deb(sha256: str) -> packages.Deb:
    return packages.Deb("owls", "1.0-1", sha256, "CC0", "https://example.org")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLLM_JAX_DEBS", raising=False)


def test_cache_directory_follows_the_environment(tmp_path, monkeypatch):
    assert packages.cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("MLLM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages.cache_directory() == tmp_path / "xdg" / "mllm_jax"


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_members_of_a_deb_are_read_in_memory(tmp_path, monkeypatch, compression):
    files = {"usr/share/owls/a.png": b"owl", "usr/share/doc/b": b"text"}
    sha256 = write_deb(tmp_path / "owls_1.0-1_all.deb", files, compression)
    monkeypatch.setenv("MLLM_JAX_DEBS", str(tmp_path))
    found = deb(sha256).members(lambda name: name.endswith(".png"))
    assert found == {"usr/share/owls/a.png": b"owl"}


def test_an_altered_deb_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "owls_1.0-1_all.deb"
    sha256 = write_deb(path, {"a": b"1"})
    path.write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setenv("MLLM_JAX_DEBS", str(tmp_path))
    with pytest.raises(packages.MissingPackage, match=r"sha256.*delete it and build again"):
        deb(sha256).path()


def test_a_file_that_is_no_deb_is_named(tmp_path, monkeypatch):
    path = tmp_path / "owls_1.0-1_all.deb"
    path.write_bytes(b"<html>")
    monkeypatch.setenv("MLLM_JAX_DEBS", str(tmp_path))
    with pytest.raises(packages.MissingPackage, match=r"owls_1\.0-1_all\.deb.*not a Debian"):
        deb(hashlib.sha256(b"<html>").hexdigest()).members(lambda name: True)


def test_without_apt_the_mend_is_named(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(packages.MissingPackage, match=r"apt-get: put owls_1\.0.*MLLM_JAX_DEBS"):
        deb("0" * 64).path()


def test_apt_is_asked_again_with_lists_of_our_own(tmp_path, monkeypatch):
    sha256 = write_deb(tmp_path / "served.deb", {"a": b"1"})
    calls = []

    def run(command, cwd, **_):
        calls.append(command)
        served = "download" in command and any("Dir::State=" in part for part in command)
        if served:
            (cwd / "owls_1.0-1_all.deb").write_bytes((tmp_path / "served.deb").read_bytes())
        known = served or "update" in command
        return subprocess.CompletedProcess(command, 0 if known else 100, "", "E: not found\n")

    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(packages.subprocess, "run", run)
    assert deb(sha256).path() == tmp_path / "cache" / "debs" / "owls_1.0-1_all.deb"
    assert [("update" in call) for call in calls] == [False, True, False]
    deb(sha256).path()
    assert len(calls) == 3  # from the cache


def test_a_failing_apt_says_why(monkeypatch):
    failed = subprocess.CompletedProcess((), 100, "", "W: slow\nE: Version '1.0-1' was not found\n")
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(packages.MissingPackage, match=r"owls=1\.0-1 \(E: Version.*MLLM_JAX_DEBS"):
        deb("0" * 64).path()


def test_a_wheel_that_is_not_installed_is_named_with_the_mend():
    wheel = packages.Wheel("no-such-package", "1.2", "MIT", "https://example.org")
    with pytest.raises(
        packages.MissingPackage, match=r"pip install --no-deps no-such-package==1\.2"
    ):
        wheel.file("a.png")


def test_a_wheel_without_the_file_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    wheel = packages.Wheel("other-version", "1.2", "MIT", "https://example.org")
    with pytest.raises(packages.MissingPackage, match=r"holds no file 'a\.png'.*==1\.2"):
        wheel.file("a.png")
