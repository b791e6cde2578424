"""The README's Python runs as it is written."""

from __future__ import annotations

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, capsys):
    pytest.importorskip("gguf")
    exec(compile(block, str(README), "exec"), {})
    assert "edit" not in capsys.readouterr().err
