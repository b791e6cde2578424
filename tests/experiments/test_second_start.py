"""The second start of a study finds every program in the cache that the first has left."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.helpers import studies

COUNTED = """
import atexit, collections, json, runpy, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
atexit.register(lambda: print(json.dumps(events)))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
CACHE = "/jax/compilation_cache/"


@pytest.mark.slow
def test_the_second_start_compiles_nothing(command, tmp_path):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    config, fields = studies.STUDIES["domain_neurons"]
    small, found = [f"--config.{name}={value}" for name, value in fields.items()], []
    for start in ("first", "second"):
        python, _, *rest = command("domain_neurons", config, tmp_path / start, *small)
        done = subprocess.run(
            [python, "-c", COUNTED, *rest], cwd=studies.ROOT, text=True, capture_output=True,
            env=inherited | studies.ENVIRONMENT | {"MLLM_JAX_CACHE": str(tmp_path / "cache")},
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert 1 < first[f"{CACHE}cache_misses"] <= second[f"{CACHE}cache_hits"]
    assert second.get(f"{CACHE}cache_misses", 0) == 0, second
    assert second[f"{CACHE}cache_hits"] == second[f"{CACHE}compile_requests_use_cache"]
