import dataclasses
import itertools

import jax
import numpy as np
import pytest

from mllm_jax.analysis import probe

SMALL = probe.Probe(hidden=(16, 8), rate=3e-3, batch=16, epochs=60, patience=5)


def blobs(sizes, *, width=6, classes=3, spread=1.0, seed=0):
    """Parts of pictures whose classes overlap."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    parts = []
    for size in sizes:
        labels = rng.integers(0, classes, size)
        noise = rng.normal(size=(size, width)) * spread
        parts.append(probe.Part((centres[labels] + noise).astype(np.float32), labels))
    return parts


def accuracy(found, test):
    return (found.predicted == test.labels).mean(-1)


@pytest.fixture(scope="module")
def fitted():
    parts = blobs((90, 30, 60))
    return parts, probe.fit(SMALL, *parts, classes=3, seeds=(0, 1, 2))


def test_parameters_are_those_of_the_paper():
    assert probe.BEFORE.parameters(1024, 47) == 13_721_959
    assert probe.AFTER.parameters(4096, 47) == 13_780_015
    control = probe.matched(1024, 4096)
    assert control.parameters(1024, 47) == control.parameters(4096, 47)


def test_class_ids_do_not_depend_on_the_order():
    names, ids = probe.class_ids(["dog", "cat", "owl", "cat"])
    assert names == ("cat", "dog", "owl") and ids.tolist() == [1, 0, 2, 0]
    assert probe.class_ids(["owl", "cat", "dog"])[0] == names


def test_held_out_examples_are_a_share_of_each_class():
    labels = np.repeat([0, 1, 2, 3], [10, 5, 2, 1])
    held = probe.hold_out(labels, 0.2, seed=4)
    assert np.bincount(labels[held], minlength=4).tolist() == [2, 1, 1, 0]
    assert (held == probe.hold_out(labels, 0.2, seed=4)).all()
    assert any((held != probe.hold_out(labels, 0.2, seed=s)).any() for s in range(5, 9))


def test_it_learns_and_every_seed_is_its_own(fitted):
    (_, _, test), found = fitted
    assert found.predicted.shape == (3, 60) and found.predicted.dtype == np.int32
    assert (accuracy(found, test) > 0.75).all()
    assert len({tuple(row[np.isfinite(row)]) for row in found.losses}) == 3


def test_equal_arguments_give_equal_figures(fitted):
    parts, found = fitted
    again = probe.fit(SMALL, *parts, classes=3, seeds=(0, 1, 2))
    for name in found._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))


@pytest.mark.slow
def test_a_seed_is_the_same_alone_and_a_site_the_same_among_others(fitted):
    (train, held, test), found = fitted
    alone = probe.fit(SMALL, train, held, test, classes=3, seeds=(1,))
    np.testing.assert_array_equal(alone.epochs[0], found.epochs[1])
    np.testing.assert_allclose(alone.losses[0], found.losses[1], atol=1e-5)
    sites = [part._replace(features=np.stack([-part.features, part.features]))
             for part in (train, held, test)]  # fmt: skip
    both = probe.fit(SMALL, *sites, classes=3, seeds=(0, 1, 2))
    assert both.predicted.shape == (2, 3, 60)
    np.testing.assert_allclose(both.losses[1], found.losses, atol=1e-5)
    assert np.abs(both.losses[0] - found.losses)[:, 0].min() > 1e-3


@pytest.mark.slow
def test_lanes_in_turns_are_lanes_at_once(fitted, monkeypatch):
    parts, found = fitted
    monkeypatch.setattr(probe, "AT_ONCE", 2 * SMALL.parameters(6, 3))
    turns = probe.fit(SMALL, *parts, classes=3, seeds=(0, 1, 2))
    np.testing.assert_allclose(turns.losses, found.losses, atol=1e-5)


def test_training_ends_when_the_held_out_loss_no_longer_falls(fitted):
    (train, _, test), found = fitted
    for losses, epochs in zip(found.losses, found.epochs, strict=True):
        run = np.isfinite(losses).sum()
        assert losses[:run].argmin() + 1 == epochs
        assert run == min(epochs + SMALL.patience, SMALL.epochs)
    # Of held-out labels that contradict those for training, any learning is too much.
    wrong = probe.Part(train.features, (train.labels + 1) % 3)
    stopped = probe.fit(SMALL, train, wrong, test, classes=3, seeds=(0, 1, 2))
    assert (stopped.epochs <= 3).all() and (stopped.epochs < found.epochs).all()


def test_a_loss_that_is_hardly_lower_does_not_count(fitted):
    parts, found = fitted
    # lower than anything is the first alone
    strict = dataclasses.replace(SMALL, least=10.0)
    stopped = probe.fit(strict, *parts, classes=3, seeds=(0, 1, 2))
    assert stopped.epochs.tolist() == [1, 1, 1]
    assert (np.isfinite(stopped.losses).sum(-1) == 1 + SMALL.patience).all()


@pytest.mark.slow
def test_the_released_code_does_not_stop(fitted):
    (train, held, test), _ = fitted
    released = dataclasses.replace(probe.released(SMALL), epochs=4)
    assert (released.rate, released.batch, probe.released(SMALL).epochs) == (1e-3, 32, 100)
    wrong = probe.Part(held.features, (held.labels + 1) % 3)
    found = probe.fit(released, train, wrong, test, classes=3, seeds=(0,))
    assert found.epochs.tolist() == [4] and np.isfinite(found.losses).all()


def test_test_labels_are_never_read(fitted):
    (train, held, test), found = fitted
    blind = probe.Part(test.features, np.zeros_like(test.labels))
    again = probe.fit(SMALL, train, held, blind, classes=3, seeds=(0, 1, 2))
    np.testing.assert_array_equal(again.predicted, found.predicted)


def test_matched_sites_are_read_through_as_many_numbers():
    train, held, test = blobs((40, 20, 20))
    rng = np.random.default_rng(1)
    wide = np.concatenate([train.features, 0.01 * rng.normal(size=(40, 5))], 1)[None]
    probe_ = dataclasses.replace(probe.matched(6, 11), standard=False)
    narrow, same = probe.prepare(probe_, train.features[None], test.features[None])
    assert narrow.shape == (1, 40, 6) and same.shape == (1, 20, 6)
    # a rotation keeps distances; components that are left out took nothing of weight with them

    def between(x):
        return np.linalg.norm(x[0, 1:] - x[0, :-1], axis=-1)

    np.testing.assert_allclose(between(narrow), between(train.features[None]), rtol=1e-5)
    np.testing.assert_allclose(between(same), between(test.features[None]), rtol=1e-5)
    (fewer,) = probe.prepare(probe_, wide)
    assert fewer.shape == (1, 40, 6)
    np.testing.assert_allclose(between(fewer), between(wide), rtol=1e-2)


def test_fewer_examples_than_components():
    train, _, test = blobs((5, 20, 20), width=9)
    few = probe.prepare(probe.matched(9), train.features[None], test.features[None])
    assert [x.shape for x in few] == [(1, 5, 4), (1, 20, 4)]


def test_standardised_by_the_training_examples():
    x = np.array([[[1.0, 5], [3, 5]]])
    train, test = probe.prepare(probe.LINEAR, x, x + 2)
    assert train.tolist() == [[[-1, 0], [1, 0]]] and test.tolist() == [[[1, 2], [3, 2]]]
    assert (probe.prepare(probe.BEFORE, x)[0] == x).all()


def test_what_cannot_be_fitted_is_said():
    train, held, test = blobs((20, 10, 10))
    with pytest.raises(ValueError, match="held: a label is 2, but classes=2"):
        two = [part._replace(labels=np.minimum(part.labels, 1)) for part in (train, test)]
        probe.fit(SMALL, two[0], held, two[1], classes=2)
    with pytest.raises(ValueError, match=r"test: features must be .* got \(9, 6\) and \(10,\)"):
        probe.fit(SMALL, train, held, test._replace(features=test.features[:9]), classes=3)
    bad = train._replace(features=train.features + np.eye(20, 6) * np.nan)
    with pytest.raises(ValueError, match=r"train: features\[0, 0\] is not finite"):
        probe.fit(SMALL, bad, held, test, classes=3)
    with pytest.raises(FloatingPointError, match="after 30 of its epochs; lower its rate"):
        late = dataclasses.replace(SMALL, rate=1e17, patience=None, epochs=30)
        probe.fit(late, train, held, test, classes=3, seeds=(0,))
    with pytest.raises(FloatingPointError, match="lower its rate"):
        hot = dataclasses.replace(SMALL, rate=1e30)
        probe.fit(hot, train, held, test, classes=3, seeds=(0,))


def torch_probe(settings, train, held, test, *, widths, seed=0, params=None):
    """The probe as it is written in PyTorch: (predictions, epochs, losses)."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(widths)]
    for layer, given in zip(layers, params or ()):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.asarray(given[0]).T))
            layer.bias.copy_(torch.tensor(np.asarray(given[1])))
    net = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
    adam = torch.optim.Adam(net.parameters(), lr=settings.rate)
    of = [(torch.tensor(x[0]), torch.tensor(part.labels)) for x, part in zip(
        probe.prepare(settings, *(p.features[None] for p in (train, held, test))),
        (train, held, test),
    )]  # fmt: skip
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*of[0]), batch_size=settings.batch, shuffle=True
    )
    losses, best, said = [], 0, None
    for epoch in range(settings.epochs):
        if epoch - best >= settings.patience:
            break
        for x, y in loader:
            adam.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            adam.step()
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(net(of[1][0]), of[1][1])))
            if losses[-1] <= min(losses):
                best, said = epoch + 1, net(of[2][0]).argmax(-1).numpy()
    return said, best, losses


def test_from_the_same_weights_pytorch_learns_the_same():
    pytest.importorskip("torch")
    parts = blobs((64, 30, 60))
    whole = dataclasses.replace(SMALL, batch=64)  # one batch an epoch: no order to differ in
    widths = whole.widths(6, 3)
    found = probe.fit(whole, *parts, classes=3, seeds=(5,))
    params = probe.start(widths, jax.random.split(jax.random.key(5))[0])
    said, best, losses = torch_probe(whole, *parts, widths=widths, params=params)
    assert found.epochs[0] == best
    np.testing.assert_allclose(found.losses[0, : len(losses)], losses, atol=1e-4)
    assert np.isnan(found.losses[0, len(losses) :]).all()
    np.testing.assert_array_equal(found.predicted[0], said)


@pytest.mark.slow
def test_with_weights_of_its_own_pytorch_agrees_within_its_seed_deviation():
    pytest.importorskip("torch")
    parts = blobs((90, 40, 200), spread=1.5)
    test, seeds = parts[2], range(6)
    ours = accuracy(probe.fit(SMALL, *parts, classes=3, seeds=seeds), test)
    theirs = [torch_probe(SMALL, *parts, widths=SMALL.widths(6, 3), seed=s)[0] for s in seeds]
    theirs = (np.array(theirs) == test.labels).mean(-1)
    assert abs(ours.mean() - theirs.mean()) <= theirs.std(ddof=1)
    assert 0.5 < ours.mean() < 0.95  # neither chance nor all right, where all would agree
