"""The layers of the house: a package imports from the layers below its own alone.

And a family is a folder: no identifier and no import outside of `mllm_jax/families` names one.
Strings may, as an example of a model id or as the name of a released model that a user types.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re

import pytest

from mllm_jax import families

ROOT = pathlib.Path(__file__).parents[1]
# From the ground up. The rooms of one line may import from each other.
LAYERS = (
    (
        "deprecated",
        "files",
        "typing",
        "arguments",
        "selections",
        "sites",
        "addresses",
        "token_names",
        "tokens",
        "positions",
        "notebook",
        "notebook_results",
    ),
    ("sharding", "numerics"),
    ("store", "batch"),
    ("models",),
    ("interventions",),
    ("checkpoints",),
    ("processors",),
    ("families",),
    ("loading",),
    ("dictionaries",),
    ("passes",),
    ("data",),
    ("training", "evaluation", "analysis"),
    ("report",),
    ("planning",),
    ("mllm_jax",),
    ("experiments",),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(
    path
    for package in ("mllm_jax", "experiments")
    for path in (ROOT / package).rglob("*.py")
    if "__pycache__" not in path.parts
)
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))  # rivals name classes of transformers


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """`mllm_jax.passes.run` and `mllm_jax.passes` are in passes, `mllm_jax.run` in mllm_jax."""
    package, *rest = module.split(".")
    return rest[0] if package == "mllm_jax" and rest and rest[0] in LAYER else package


def imported(source: str, module: str, package: bool) -> set[str]:
    """The modules of ours that a file imports, at its top or inside a function, and their names."""
    names: set[str] = set()
    parent = module if package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            of = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
            names |= {of} | {f"{of}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in ("mllm_jax", "experiments")}
    # `from mllm_jax import sites` is an import of sites, not of all that the package exports.
    return ours - {"mllm_jax"} if any(room_of(n) != "mllm_jax" for n in ours) else ours


def upward(source: str, module: str, package: bool = False) -> list[str]:
    """The imports of a file that lead up."""
    own = room_of(module)
    rooms = {room_of(name) for name in imported(source, module, package)}
    return [f"{own} -> {room}" for room in sorted(rooms) if LAYER[room] > LAYER[own]]


def identifiers(source: str) -> set[str]:
    """All names in a file: of variables, attributes, arguments, functions, classes, imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                names.add(value)
    return names


def naming_a_family(source: str) -> list[str]:
    folders = (name.replace("_", "") for name in families.FAMILIES)
    pattern = re.compile("|".join(folders), re.IGNORECASE)
    return sorted(name for name in identifiers(source) if pattern.search(name.replace("_", "")))


def test_every_room_has_a_layer():
    rooms = {room_of(name_of(path)) for path in MODULES}
    top = {path.stem for path in (ROOT / "mllm_jax").iterdir() if path.suffix == ".py"}
    top |= {path.parent.name for path in (ROOT / "mllm_jax").glob("*/__init__.py")}
    assert rooms == set(LAYER)
    assert top - {"__init__"} == set(LAYER) - {"mllm_jax", "experiments"}


def test_no_import_leads_up():
    found = {
        name_of(path): upward(
            path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py"
        )
        for path in MODULES
    }
    assert {name: up for name, up in found.items() if up} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from mllm_jax.passes import run",
        "from mllm_jax import passes",
        "import mllm_jax.passes.run",
        "from ..passes import run",
        "def f():\n    from mllm_jax.passes.run import run",
        "if TYPE_CHECKING:\n    import mllm_jax.passes as p",
    ],
)
def test_an_import_that_leads_up_is_found(line):
    assert upward(line, "mllm_jax.models.never") == ["models -> passes"]
    assert upward(line, "mllm_jax.planning.never") == []


def test_an_import_of_the_whole_package_is_found():
    assert upward("import mllm_jax as mj", "mllm_jax.report.never") == ["report -> mllm_jax"]
    assert upward("from mllm_jax import run", "mllm_jax.report.never") == ["report -> mllm_jax"]
    assert upward("import mllm_jax as mj", "experiments.never") == []


def test_docs_show_these_layers():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```layers\n(.*?)```", text, re.DOTALL)
    assert [line.split() for line in shown.splitlines()] == [list(rooms) for rooms in LAYERS]


def test_no_file_outside_the_families_names_one():
    inside = ROOT / "mllm_jax/families"
    found = {
        name_of(path): naming_a_family(path.read_text(encoding="utf-8"))
        for path in (*MODULES, *BENCHMARKS)
        if not path.is_relative_to(inside)
    }
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from mllm_jax.families.llava.model import Config",
        "from mllm_jax.families import llava_next as family",
        "config = LlavaNextConfig()",
        "def read_instructblip(): pass",
        "value = module.InstructBlip",
        "call(llava=1)",
    ],
)
def test_a_name_of_a_family_is_found(source):
    assert naming_a_family(source)
    assert not naming_a_family("'''Load \"llava-hf/llava-1.5-7b-hf\".'''\nname = 'llava'")


def test_a_family_is_a_folder_and_one_line_of_the_registry():
    folders = {path.parent.name for path in (ROOT / "mllm_jax/families").glob("*/__init__.py")}
    assert folders == set(families.FAMILIES)
    lines = (ROOT / "mllm_jax/families/__init__.py").read_text(encoding="utf-8").splitlines()
    for folder in folders:
        assert lines.count(f'    "{folder}",') == 1
