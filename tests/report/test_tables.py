import pytest

from mllm_jax.report import tables


def test_table(tmp_path):
    path = tmp_path / "t.csv"
    tables.write(path, ["name", "value"], [["a, b", 0.1 + 0.2], ['"', None]])
    assert path.read_bytes() == b'name,value\n"a, b",0.30000000000000004\n"""",\n'


def test_table_with_a_ragged_row(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv: a row of 1 values under 2 columns"):
        tables.write(tmp_path / "t.csv", ["a", "b"], [[1, 2], [3]])
    assert not (tmp_path / "t.csv").exists()


def test_markdown():
    assert tables.markdown(("name", "n"), [("a", 10), ("longer", 2)]).splitlines() == [
        "| name   | n  |",
        "|--------|----|",
        "| a      | 10 |",
        "| longer | 2  |",
    ]
