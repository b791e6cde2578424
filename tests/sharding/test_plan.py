"""Plans: work counted by hand, programs read, branches for accelerators, and what they promise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.interventions import run
from mllm_jax.models import llava
from mllm_jax.sharding import chips, hlo, plan, programs, work

TINY = llava.LlavaConfig.tiny()
SIZE = programs.Size(rows=2, words=20, steps=5, lanes=3)


def test_a_matrix_product_in_a_loop_counts_as_often_as_it_runs():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jnp.ones((4, 8)), jnp.ones((7, 8, 8))
    assert work.flops(loop, x, w) == 7 * 2 * 4 * 8 * 8
    text = jax.jit(loop).lower(x, w).compile().as_text()
    program = hlo.Program(text)
    assert program.loops() == [7]
    assert program.work().flops == 7 * 2 * 4 * 8 * 8
