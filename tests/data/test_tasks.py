"""Classification tasks: counts, balance, order, and no near copies between the splits."""

from __future__ import annotations

import collections

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from mllm_jax.data import domains, tasks
from mllm_jax.data.embedded import questions, recipe

COUNTS = {"a fig": 12, "a pear": 20, "a plum": 40}


def painted(seed: int) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return PIL.Image.fromarray(noise).resize((64, 64))


def example(number: int, label: str, image: PIL.Image.Image | None = None) -> domains.Example:
    return domains.Example(
        id=f"{label} {number}", domain="fruit", label=label,
        encoded=recipe.jpeg(image or painted(number)),
        questions=questions.questions_for(str(number), label, tuple(COUNTS)),
    )  # fmt: skip


def fruit(counts=COUNTS, first: int = 0, extra=()) -> domains.Domain:
    made = [
        example(first + 1000 * kind + number, label)
        for kind, (label, count) in enumerate(counts.items())
        for number in range(count)
    ]
    return domains.Domain("fruit", "all", [*made, *extra])


@pytest.fixture(scope="module")
def divided() -> tasks.Task:
    return tasks.Task.from_domain(fruit(), topic="kinds of fruit")


def names(split) -> list[str]:
    return [example.id for example in split]


def test_a_domain_is_divided_by_class(divided):
    assert divided.classes == ("a fig", "a pear", "a plum")
    assert (divided.name, divided.topic, divided.train.split) == (
        "fruit",
        "kinds of fruit",
        "train",
    )
    # A quarter of 12, 20 and 24 (twice the smallest) is for testing; a fifth of the rest is held.
    assert divided.counts("test").tolist() == [3, 5, 6]
    assert divided.counts("held").tolist() == [2, 3, 4]
    assert divided.counts("train").tolist() == [7, 12, 14]
    every = [name for split in tasks.SPLITS for name in names(divided[split])]
    assert len(set(every)) == len(every)
    assert divided.ids("test").dtype == np.int32
    for split in tasks.SPLITS:
        for shown, number in zip(divided[split], divided.ids(split), strict=True):
            assert shown.label == divided.classes[number] == shown.id.rsplit(" ", 1)[0]


def test_any_beginning_is_balanced(divided):
    first = collections.Counter(divided.ids("train")[:9].tolist())
    assert min(first.values()) >= 2 and max(first.values()) <= 4


def test_the_seed_alone_decides(divided):
    again, other = (tasks.Task.from_domain(fruit(), topic="kinds of fruit", seed=s) for s in (0, 1))
    assert again.fingerprint == divided.fingerprint != other.fingerprint
    assert set(names(other.test)) != set(names(divided.test))
    backwards = domains.Domain("fruit", "all", list(fruit())[::-1])
    assert names(tasks.Task.from_domain(backwards).train) == names(divided.train)


def test_the_order_of_the_classes_is_that_of_their_ids():
    classes = {"plum": "a plum", "pear": "a pear"}
    task = tasks.Task.from_domain(fruit(), classes=classes)
    assert task.classes == ("plum", "pear")
    assert {shown.label for shown in task.test} == {"plum", "pear"}
    assert all(("plum" in shown.id) == (number == 0)
               for shown, number in zip(task.train, task.ids("train")))  # fmt: skip
    assert tasks.Task.from_domain(fruit(), classes=["a plum", "a fig"]).classes[0] == "a plum"


@pytest.mark.parametrize("change", [lambda im: im, PIL.ImageOps.mirror, lambda im: im.point(
    lambda v: v * 0.8 + 20)], ids=["copy", "mirrored", "paler"])  # fmt: skip
def test_near_copies_are_never_in_two_splits(change):
    """Every picture has a near copy: a test picture's own are left out, others stay together."""
    copies = [example(n + 500, "a fig", change(painted(n))) for n in range(12)]
    task = tasks.Task.from_domain(fruit({"a fig": 12, "a pear": 24}, extra=copies))
    where = {name: split for split in tasks.SPLITS for name in names(task[split])}
    pairs = [(f"a fig {n}", f"a fig {n + 500}") for n in range(12)]
    assert sum(one in where and other in where for one, other in pairs) >= 10
    assert all(where[one] == where[other] for one, other in pairs if {one, other} <= set(where))

    tested = domains.Domain("fruit", "test", [*copies[:4], example(77, "a pear")])
    task = tasks.Task.from_domain(fruit({"a fig": 12, "a pear": 12}), tested)
    assert sorted(names(task.test)) == sorted(names(tested))
    seen = {*names(task.train), *names(task.held)}
    assert {f"a fig {n}" for n in range(12)} - seen == {f"a fig {n}" for n in range(4)}


def test_a_group_is_never_in_two_splits():
    def group(shown):
        return str(int(shown.id.split()[-1]) // 2)

    task = tasks.Task.from_domain(fruit(), group=group, ratio=10)
    groups = [{group(shown) for shown in task[split]} for split in tasks.SPLITS]
    assert all(groups)
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    alone = tasks.Task.from_domain(fruit(), ratio=10)
    apart = [{group(shown) for shown in alone[split]} for split in tasks.SPLITS]
    assert apart[0] & apart[1]  # so the test can fail


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="'fruit' needs two classes or more, no two alike"):
        tasks.Task.from_domain(fruit(), classes=["a fig"])
    with pytest.raises(ValueError, match="no two alike"):
        tasks.Task.from_domain(fruit(), classes=["a fig", "a fig"])
    with pytest.raises(ValueError, match="class 'a kiwi' has no picture"):
        tasks.Task.from_domain(fruit(), classes=["a fig", "a kiwi"])
    with pytest.raises(ValueError, match="class 'a fig' has no picture for train"):
        tasks.Task.from_domain(
            fruit({"a fig": 1, "a pear": 8}), fruit({"a fig": 1, "a pear": 1}, 50)
        )
    with pytest.raises(ValueError, match="unknown split 'val'; a task has train, held, test"):
        tasks.Task.from_domain(fruit())["val"]


@pytest.fixture(scope="module")
def embedded() -> dict[str, tasks.Task]:
    if not all((domains.default_root() / name).is_dir() for name in tasks.EMBEDDED):
        pytest.skip("the embedded domains are not built here")
    return tasks.embedded()


@pytest.mark.parametrize("name", tasks.EMBEDDED)
def test_embedded_tasks(embedded, name):
    task = embedded[name]
    assert task.classes == tuple(tasks.EMBEDDED[name][1])
    smallest = {split: task.counts(split).min() for split in tasks.SPLITS}
    assert len(task.classes) >= 4 and smallest["train"] >= 15 and smallest["test"] >= 7
    assert smallest["held"] >= 3
    for split in tasks.SPLITS:
        assert task.counts(split).max() <= 2.5 * smallest[split]
    thumbnails = {
        split: np.stack([recipe.thumbnail(shown.image) for shown in task[split]])
        for split in tasks.SPLITS
    }
    for one, other in (("train", "held"), ("train", "test"), ("held", "test")):
        alike = np.einsum("imp,jp->imj", thumbnails[one], thumbnails[other][:, 0])
        assert alike.max() < recipe.NEAR_COPY
