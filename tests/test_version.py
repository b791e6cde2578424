"""The version is written once."""

import pathlib
import subprocess
import sys

import mllm_jax


def test_setup_reads_the_version_without_importing_the_package():
    root = pathlib.Path(mllm_jax.__file__).parent.parent
    code = "import runpy, setuptools, sys; setuptools.setup = lambda **of: print(of['version'], 'jax' in sys.modules); runpy.run_path('setup.py')"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    ).stdout.split()
    assert said == [mllm_jax.__version__, "False"]
