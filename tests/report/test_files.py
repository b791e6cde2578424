import errno
import pathlib

import pytest

from mllm_jax.report import files, tables


def test_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    files.write(path, "one")
    files.write(path, "zwei, drei: ü")
    assert path.read_text(encoding="utf-8") == "zwei, drei: ü"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_full_disk_keeps_the_old_file_and_says_where(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write \(No space left on device\).*a\.txt"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_table(tmp_path):
    path = tmp_path / "t.csv"
    tables.write(path, ["name", "value"], [["a, b", 0.1 + 0.2], ['"', None]])
    assert path.read_bytes() == b'name,value\n"a, b",0.30000000000000004\n"""",\n'


def test_table_with_a_ragged_row(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv: a row of 1 values under 2 columns"):
        tables.write(tmp_path / "t.csv", ["a", "b"], [[1, 2], [3]])
    assert not (tmp_path / "t.csv").exists()
