"""Notebooks: their code runs from top to bottom, and what it shows is stored in the file.

    python -m tests.helpers.notebooks docs/notebooks/first_hour.ipynb

writes the outputs of a run into the file, as Jupyter does.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import pathlib
import sys
from typing import Any

Cell = dict[str, Any]


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], name: str) -> list[list[Cell]]:
    """The outputs of each code cell; lines of IPython itself, which begin with %, are left out."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [
        _run_cell("".join(cell["source"]), names, f"{name}, cell {number}")
        for number, cell in enumerate(code_cells(notebook))
    ]


def _run_cell(source: str, names: dict[str, Any], place: str) -> list[Cell]:
    lines = [line for line in source.splitlines() if not line.lstrip().startswith("%")]
    tree = ast.parse("\n".join(lines), place)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, place, "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
    outputs: list[Cell] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(text)})
    if value is not None:
        outputs.append(
            {"data": shown(value), "metadata": {}, "output_type": "execute_result",
             "execution_count": None}
        )  # fmt: skip
    return outputs


def shown(value: Any) -> dict[str, Any]:
    """What Jupyter shows of a value, by media type."""
    html = value._repr_html_() if hasattr(value, "_repr_html_") else None
    if html is not None:  # a figure of matplotlib has none
        return {"text/html": _lines(html), "text/plain": [type(value).__name__]}
    if hasattr(value, "savefig"):
        png = io.BytesIO()
        value.savefig(png, format="png", dpi=80, metadata={"Software": None})
        code = base64.b64encode(png.getvalue()).decode()
        return {"image/png": code, "text/plain": [type(value).__name__]}
    if hasattr(value, "_repr_png_"):
        code = base64.b64encode(value._repr_png_()).decode()
        return {"image/png": code, "text/plain": [type(value).__name__]}
    return {"text/plain": _lines(repr(value))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def kinds(outputs: list[Cell]) -> list[list[str]]:
    """The media types of the outputs of a cell."""
    return [sorted(output.get("data", {"stream": None})) for output in outputs]


def main(paths: list[str]) -> None:
    for path in map(pathlib.Path, paths):
        notebook = read(path)
        for number, (cell, outputs) in enumerate(
            zip(code_cells(notebook), run(notebook, path.name), strict=True), 1
        ):
            cell["execution_count"], cell["outputs"] = number, outputs
            for output in outputs:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = number
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
