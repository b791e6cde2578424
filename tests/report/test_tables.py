import csv

import numpy as np
import pytest

from mllm_jax.report import tables


def test_table(tmp_path):
    path = tmp_path / "t.csv"
    tables.write(path, ["name", "value"], [["a, b", 0.1 + 0.2], ['"', None]])
    assert path.read_bytes() == b'name,value\n"a, b",0.30000000000000004\n"""",\n'


def test_table_with_a_ragged_row(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv: a row has 1 values for 2 columns"):
        tables.write(tmp_path / "t.csv", ["a", "b"], [[1, 2], [3]])
    assert not (tmp_path / "t.csv").exists()


def test_markdown():
    assert tables.markdown(("name", "n"), [("a", 10), ("longer", 2)]).splitlines() == [
        "| name   | n  |",
        "|--------|----|",
        "| a      | 10 |",
        "| longer | 2  |",
    ]


def test_a_spreadsheet_runs_no_cell_and_numbers_stay_numbers(tmp_path):
    path = tmp_path / "t.csv"
    texts = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", " =1", "\t=1", "\uff1d1", "a=b", ""]
    values = [-0.5, np.float32(-1.5), -3, np.int64(-4), float("-inf"), "-0.25", "+1e-5", True, None]
    tables.write(path, ["=a", "b"], zip(texts, values, strict=True))
    with path.open(newline="") as file:
        (head, *rows) = list(csv.reader(file))
    assert head == ["'=a", "b"]
    inert = [f"'{text}" for text in texts[:7]]
    assert [row[0] for row in rows] == [*inert, "a=b", ""]
    assert [float(row[1]) for row in rows[:7]] == [-0.5, -1.5, -3, -4, -np.inf, -0.25, 1e-5]
    assert [row[1] for row in rows[7:]] == ["True", ""]


def test_latex_keeps_texts_as_text():
    rows = [["50 % & $x_1$", "\N{MINUS SIGN}1"], [r"a\b{c}", "2"]]
    assert tables.latex(["name", "#"], rows, [False, True]).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"name & \# \\",
        r"\midrule",
        r"50 \% \& \$x\_1\$ & $-$1 \\",
        r"a\textbackslash{}b\{c\} & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
