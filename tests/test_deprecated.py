"""Old names work, warn where they are used, and cost nothing before."""

import importlib
import subprocess
import sys

import pytest

import mllm_jax as mj
from mllm_jax import deprecated
from mllm_jax import sites as S
from mllm_jax.interventions import binding

MOVED = deprecated.MODULES | deprecated.MEMBERS


@pytest.fixture(autouse=True)
def not_imported(monkeypatch):
    """No test finds an old module that another has imported."""
    for name in deprecated.MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        owner = sys.modules.get(name.rpartition(".")[0])
        if owner is not None:
            vars(owner).pop(name.rpartition(".")[2], None)
    yield
    for name in deprecated.MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("old", MOVED)
def test_a_new_name_is_there_and_the_old_one_is_gone(old):
    owner, _, name = MOVED[old].rpartition(".")
    if old in deprecated.MODULES:
        assert importlib.import_module(MOVED[old]).__file__
    else:
        assert hasattr(importlib.import_module(owner), name)
    finders = [f for f in sys.meta_path if not isinstance(f, deprecated._Finder)]
    paths = importlib.import_module("mllm_jax").__path__
    assert old.count(".") > 1 or all(f.find_spec(old, paths) is None for f in finders)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old", deprecated.MEMBERS)
def test_an_old_member_is_the_new_one(old):
    owner, _, name = old.rpartition(".")
    room, _, new = deprecated.MEMBERS[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{old} is now {room}.{new}"):
        assert getattr(importlib.import_module(owner), name) is getattr(
            importlib.import_module(room), new
        )


def test_an_old_module_is_imported_and_has_the_same_members():
    with pytest.warns(DeprecationWarning, match=r"products is now mllm_jax\.numerics") as warned:
        from mllm_jax.products import prefer_eigen
    assert warned[0].filename == __file__
    assert prefer_eigen is importlib.import_module("mllm_jax.numerics.products").prefer_eigen


def test_a_member_that_went_elsewhere_is_found():
    with pytest.warns(DeprecationWarning) as warned:
        from mllm_jax.interventions import run

        assert run.bind is binding.bind
        assert run.Out is importlib.import_module("mllm_jax.passes.run").Out
    said = [str(warning.message) for warning in warned]
    assert any("run.bind is now mllm_jax.interventions.binding.bind" in line for line in said)
    assert {warning.filename for warning in warned} == {__file__}


def test_an_old_module_is_an_attribute_of_its_package():
    with pytest.warns(DeprecationWarning) as warned:
        assert mj.interventions.run.bind is binding.bind
        assert mj.tokens.all is mj.tokens.every
        assert mj.precision.einsum is importlib.import_module("mllm_jax.numerics.precision").einsum
        assert S.lm.resid_post.lens == "blocks.{i}.hook_resid_post"
    assert {warning.filename for warning in warned} == {__file__} and len(warned) == 5


def test_names_that_never_were_are_still_errors():
    with pytest.raises(AttributeError, match="'mllm_jax' has no attribute 'nothing'"):
        _ = mj.nothing
    with pytest.raises(ImportError):
        importlib.import_module("mllm_jax.nothing")
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match="nothing"):
        from mllm_jax.interventions.run import nothing  # noqa: F401


def test_the_package_uses_no_old_name_itself():
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning); "
        "import mllm_jax, sys; from mllm_jax import deprecated; "
        "print(sorted(set(deprecated.MODULES) & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert said.stdout.strip() == "[]", said.stderr[-500:]
