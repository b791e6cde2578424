"""The probe that learns from pictures which fine-tuning did not see."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.projection import probes
from mllm_jax.analysis import probe


def test_pictures_of_a_class_are_spread_over_folds():
    labels = np.array([0, 1, 2] * 6)
    fold = probes.folds(labels)
    for number in range(probes.FOLDS):
        assert len(set(labels[fold == number])) == 3
    assert np.bincount(fold).tolist() == [6, 6, 3, 3]
    assert not probes.folds(np.arange(5)).any()  # one picture a class


def test_each_picture_is_read_by_a_probe_of_others(monkeypatch):
    """The parts of every fit, and where the predictions end up."""
    labels = np.arange(16, dtype=np.int32) % 4
    features = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    held = probe.Part(features[:, :4] + 1000, labels[:4])
    seen = []

    def fit(kind, train, stop, test, *, classes, seeds):
        assert stop is held and (classes, seeds) == (4, (7,))
        taught, read = (set(part.features[0, :, 0]) for part in (train, test))
        assert not taught & read and len(taught | read) == 16
        seen.extend(read)
        predicted = np.broadcast_to(test.labels, (2, 1, len(test.labels)))
        return probe.Fitted(predicted, np.zeros(1), np.zeros((1, 1)))

    monkeypatch.setattr(probes.probe, "fit", fit)
    found = probes._predict_unseen(probe.LINEAR, held, probe.Part(features, labels), 4, 7)
    assert found.shape == (2, 1, 16) and (found == labels).all()
    assert sorted(seen) == features[0, :, 0].tolist()


@pytest.mark.parametrize("count, several", [(5, False), (6, True)])
def test_too_few_pictures_are_not_probed_so(count, several):
    class Study:
        @staticmethod
        def ids(task, split):
            return np.arange(count) % 5

    assert ("unseen" in probes.names(Study, "objects")) == several
