"""The projection study with narrow probes.

Those of the paper have 12 million parameters, whatever the model: on a tiny model they take longer
than all else that the study does.
"""

from __future__ import annotations

import dataclasses
import runpy

from mllm_jax.analysis import probe

if __name__ == "__main__":
    for name in ("BEFORE", "AFTER"):
        narrow = dataclasses.replace(getattr(probe, name), hidden=(16, 8))
        setattr(probe, name, narrow)
    runpy.run_module("experiments.projection", run_name="__main__")
