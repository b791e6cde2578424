"""One process: SIGTERM is heard between batches, and nothing is lost."""

from __future__ import annotations

import os
import signal

import jax
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.sharding import hosts

CAPTURES = {"fire": mj.stats(S.lm.mlp.act, by=tok.kind)}


@pytest.fixture
def heeded():
    """SIGTERM is heeded, as it is in a study."""
    before = signal.getsignal(signal.SIGTERM)
    hosts.handle_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)
    hosts._preempted.clear()


class Batches:
    """Five batches; while the third is made, SIGTERM comes."""

    def __init__(self, make_batch, stop: bool):
        self.make_batch, self.stop, self.made = make_batch, stop, []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int):
        self.made.append(number)
        if self.stop and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.make_batch(seed=number)


def test_sigterm_saves_what_is_summed_and_a_restart_goes_on(
    tiny_model, make_batch, heeded, tmp_path
):
    want = mj.reduce(CAPTURES, tiny_model, Batches(make_batch, False))
    save = tmp_path / "sums.npz"
    with pytest.raises(SystemExit) as end:
        mj.reduce(CAPTURES, tiny_model, Batches(make_batch, True), save=save)
    assert end.value.code == 128 + signal.SIGTERM
    hosts._preempted.clear()
    rest = Batches(make_batch, False)
    found = mj.reduce(CAPTURES, tiny_model, rest, save=save)
    assert rest.made == [0, 1, 2, 3, 4]  # those that are summed are compared with what they were
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_one_process_writes_agrees_and_waits_for_nobody():
    assert (
        hosts.process_count() == 1 and hosts.is_primary() and hosts.broadcast_from_primary(7) == 7
    )
    hosts.barrier("nobody")
    with pytest.raises(SystemExit, match="the disk is full"):
        hosts.fail("the disk is full")
