import numpy as np
import pytest

from mllm_jax.analysis import projection, scores
from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PROJ, Claim, Task
from tests.helpers.runs import CLASSES, answers


def task(number=0, *, images=150, runs=3, **right):
    """A task whose variants are right as often as given, by name of the model or a probe."""
    truth = np.random.default_rng((number, 77)).integers(0, CLASSES, images)
    named = {"original": ORIGINAL, "proj": PROJ, "e2e": E2E, "clip": CLIP}
    said = {
        named[name]: answers(truth, p, runs=runs, seed=(number, i))
        for i, (name, p) in enumerate(right.items())
        if name in named
    }
    probed = {
        name: {variant: answers(truth, p, runs=runs, seed=(number, 9, i))
               for i, (variant, p) in enumerate(by_variant.items())}
        for name, by_variant in right.items()
        if name not in named
    }  # fmt: skip
    return Task(truth, CLASSES, said, probed)


def study(tasks=4, **right):
    return {f"task {i}": task(i, **right) for i in range(tasks)}


def test_the_uniform_baseline_is_chance():
    truth = np.repeat(np.arange(CLASSES), 500)
    said = projection.uniform(2000, CLASSES, 5)
    assert scores.accuracy(truth, said, CLASSES).mean == pytest.approx(0.25, abs=0.02)
    assert (said == projection.uniform(2000, CLASSES, 5)).all()


def test_rows_of_a_table():
    found = task(original=0.2, proj=0.5, e2e=0.8)
    rows = projection.table(found.truth, found.predicted, CLASSES, over=ORIGINAL, resamples=200)
    assert [row["variant"] for row in rows] == [ORIGINAL, PROJ, E2E]
    first, _, last = rows
    assert first["change"] is None and first["runs"] == 3 and first["images"] == 150
    change = last["change"]
    assert change["value"] == pytest.approx(last["f1"]["mean"] - first["f1"]["mean"])
    assert change["relative"] == pytest.approx(last["f1"]["mean"] / first["f1"]["mean"] - 1)
    assert 0 < change["low"] < change["value"] < change["high"]
    nothing = {"a": np.full((1, 150), -1), "b": found.predicted[E2E]}
    row = projection.table(found.truth, nothing, CLASSES, over="a", resamples=20)[1]
    assert row["change"]["relative"] is None


def verdicts(tasks, *asked):
    found = projection.claims(tasks, asked or projection.CLAIMS, resamples=1000)
    return [row["verdict"] for row in found]


def test_claims_say_what_decides_them_and_what_could_have_been_found():
    first, second, third, last = projection.claims(
        study(original=0.2, proj=0.21, e2e=0.8, paper={ORIGINAL: 0.7, PROJ: 0.4, E2E: 0.5}),
        resamples=400,
    )
    assert first["criterion"] == "the intervals of 8 or more of 8 differences of F1 lie above zero"
    assert last["criterion"].startswith("the intervals of 3 or more of 4")
    assert "lie below zero" in second["criterion"]
    assert first["found"].count("[") == 8 and "task 0, FT-E2E +0." in first["found"]
    for row in third["comparisons"]:
        assert 0 < row["possible"] < row["likely"] < row["value"] and not row["equivalent"]
    worst = max(row["likely"] for row in first["comparisons"])
    assert first["power"] == f"differences of {worst:.2f} are found in four of five studies"
    assert last["power"] == "nothing could be found" and last["found"] == "not measured"
    few = study(original=0.2, proj=0.2, e2e=0.2, images=4)
    assert projection.claims(few, resamples=20)[2]["power"].startswith("no change of so few")


def test_equal_answers_are_told_as_such():
    tasks = study(tasks=1, original=0.5, e2e=0.9, images=100)
    same = {
        "a": Task(
            tasks["task 0"].truth,
            CLASSES,
            dict.fromkeys((PROJ, E2E), tasks["task 0"].predicted[E2E]),
        )
    }
    found = projection.claims(same, resamples=100)[2]
    assert found["comparisons"][0]["equivalent"] and found["verdict"] == "undecided"
    assert found["reason"].endswith("1 are within 0.05 of no change")


PROBES = {"paper": {BEFORE: 0.9, ORIGINAL: 0.7, PROJ: 0.4, E2E: 0.5}}


def test_a_study_like_the_papers_holds():
    tasks = study(original=0.2, proj=0.5, e2e=0.8, clip=0.5, **PROBES)
    assert verdicts(tasks) == ["holds"] * 4
    rows = projection.claims(tasks)[1]
    assert [(c["of"], c["variant"]) for c in rows["comparisons"]] == [
        ("paper", PROJ), ("paper", E2E)
    ] * 4  # fmt: skip
    assert all(c["high"] < 0 and c["side"] == "supports" for c in rows["comparisons"])
    assert rows["reason"] == "8 of 8 support it, 0 contradict it"


def test_the_opposite_fails_and_no_difference_is_undecided():
    opposite = {"paper": {ORIGINAL: 0.4, PROJ: 0.7, E2E: 0.7}}
    tasks = study(original=0.8, proj=0.5, e2e=0.2, clip=0.5, **opposite)
    assert verdicts(tasks) == ["fails"] * 4
    same = {"paper": dict.fromkeys((ORIGINAL, PROJ, E2E), 0.5)}
    tasks = study(original=0.5, proj=0.5, e2e=0.5, clip=0.5, **same)
    assert verdicts(tasks) == ["undecided"] * 4


def test_misses_are_allowed_where_the_claim_allows_them():
    good, bad, same = (task(i, original=0.5, clip=p) for i, p in enumerate((0.9, 0.1, 0.5)))
    all_, most = projection.CLAIMS[3], projection.CLAIMS[3]
    all_ = Claim(all_.text, all_.of, all_.over)

    def of(*tasks):
        return verdicts({str(i): t for i, t in enumerate(tasks)}, all_, most)

    assert of(good, good, good, bad) == ["fails", "holds"]
    assert of(good, good, good, same) == ["undecided", "holds"]
    assert of(good, good, bad, same) == ["fails", "undecided"]
    assert of(good, good, bad, bad) == ["fails", "fails"]


def test_false_verdicts_are_rare():
    """Where nothing differs, no claim is decided more often than its rule promises."""
    decided = 0
    for number in range(60):
        tasks = {str(i): task(9 * number + i, images=60, original=0.5, proj=0.5) for i in range(4)}
        claim = Claim("", (("model", PROJ),), ("model", ORIGINAL))
        (row,) = projection.claims(tasks, [claim], resamples=300)
        decided += row["verdict"] != "undecided"
    assert decided <= 8  # 5 % by the rule; a bootstrap over three runs errs a little more often


def test_what_was_not_measured_is_undecided_and_said():
    tasks = study(2, original=0.2, proj=0.5, e2e=0.8, **PROBES)
    found = projection.claims(tasks)
    assert [row["verdict"] for row in found] == ["holds"] * 3 + ["undecided"]
    assert found[3]["reason"] == "not measured: CLIP zero-shot" and not found[3]["comparisons"]
    (row,) = projection.claims(tasks, [projection.controls(["linear"])[0]])
    assert row["reason"] == (
        "not measured: FT-E2E by the linear probe, FT-Proj by the linear probe, "
        "Original by the linear probe"
    )
    assert projection.claims({})[0]["reason"] == "not measured: any task"


def test_controls_ask_again_by_other_probes():
    asked = projection.controls(["matched"])
    assert len(asked) == 3  # claim 2 by the probe; what the projection loses, by both
    probes = {**PROBES, "matched": {BEFORE: 0.5, ORIGINAL: 0.5, PROJ: 0.9, E2E: 0.9}}
    assert verdicts(study(**probes), *asked) == ["fails", "holds", "undecided"]


def test_the_papers_own_numbers():
    by_task = zip(*(projection.TABLE_1[v] for v in (CLIP, ORIGINAL, PROJ, E2E)))
    f1 = np.array([[pair[0] for pair in row] for row in by_task])  # [task, variant]
    clip, original, proj, e2e = f1.T
    assert (proj > original).all() and (e2e > proj).all()
    assert (clip > original).tolist() == [True, True, True, False]
    probe = {variant: np.array(row) for variant, row in projection.TABLE_2.items()}
    change = 100 * (probe[PROJ] / probe[ORIGINAL] - 1)
    np.testing.assert_allclose(change, [-27.49, -26.01, -29.72, -19.64], atol=0.011)
    np.testing.assert_allclose(
        100 * (probe[E2E] / probe[ORIGINAL] - 1), [-6.22, -2.95, -18.67, -3.46], atol=0.011
    )


def test_neurons_that_moved():
    before = {"projector": np.zeros((1, 6), bool), "lm": np.zeros((2, 5), bool)}
    after = {name: mask.copy() for name, mask in before.items()}
    before["projector"][0, :4] = after["projector"][0, 2:5] = True
    after["lm"][1, :3] = True
    projector, lm = projection.moved(before, after)
    assert (projector["before"], projector["after"], projector["kept"]) == (4, 3, 2)
    assert projector["jaccard"] == 2 / 5 and projector["chance"] == 2 / 5
    assert (projector["share_before"], projector["share_after"]) == (1, 0.5)
    assert (lm["jaccard"], lm["chance"], lm["share_after"]) == (0, 0, 0.5)
    assert (lm["per_layer_before"], lm["per_layer_after"]) == ([0, 0], [0, 3])
    with pytest.raises(ValueError, match="modules differ: projector, lm before, lm after"):
        projection.moved(before, {"lm": after["lm"]})
