"""Results of a projection study as they would be, made up from a seed."""

import numpy as np

from mllm_jax.analysis import projection
from mllm_jax.analysis.projection import BEFORE, E2E, ORIGINAL, PROJ

CLASSES = {"objects": 6, "astronomy": 5, "satellite": 7, "digits": 10}
SKILL = {  # of the model, by task: how often each variant is right
    ORIGINAL: (0.35, 0.20, 0.10, 0.08), PROJ: (0.60, 0.68, 0.38, 0.33),
    E2E: (0.78, 0.85, 0.62, 0.74),
}  # fmt: skip
READ = {BEFORE: 0.86, ORIGINAL: 0.74, PROJ: 0.66, E2E: 0.75}
PROBES = {"paper": 0.0, "linear": 0.05, "matched": 0.02, "unseen": 0.06}
RECIPES = (
    ("official", "", ""), ("chat", "template", "chat"), ("pad", "aspect", "pad"),
    ("low rate", "rate", "2e-5"), ("random start", "init", "random"),
    ("EOS", "end", "learned"), ("corrected", "all", "corrected"),
)  # fmt: skip
FAST = {"resamples": 200}


def answers(rng, truth, classes, right, runs=3):
    skill = np.clip(right + 0.02 * rng.normal(size=(runs, 1)), 0, 1)
    guess = rng.integers(-1, classes, (runs, len(truth)))
    return np.where(rng.random((runs, len(truth))) < skill, truth, guess)


def fake_tasks(seed: int = 0, images: int = 120) -> dict[str, projection.Task]:
    rng = np.random.default_rng(seed)
    found = {}
    for i, (name, classes) in enumerate(CLASSES.items()):
        truth = rng.integers(0, classes, images)
        said = {"Random": projection.uniform(images, classes, 3, seed=100 + i)}
        said |= {
            v: answers(rng, truth, classes, skill[i], 1 if v == ORIGINAL else 3)
            for v, skill in SKILL.items()
        }
        probed = {
            probe: {
                v: answers(rng, truth, classes, read - 0.04 * i - (shift if v != BEFORE else 0))
                for v, read in READ.items()
            }
            for probe, shift in PROBES.items()
        }
        found[name] = projection.Task(truth, classes, said, probed)
    return found


def fake_results(seed: int = 0, layers: int = 30) -> dict:
    tasks, rng = fake_tasks(seed), np.random.default_rng((seed, 1))

    def table(task, said):
        return projection.table(task.truth, said, task.classes, over=ORIGINAL, **FAST)

    results = {
        "format": 2, "study": "projection", "model": "embedded: CLIP ViT-B/16 + SmolLM2-135M",
        "projector": "", "seeds": [0, 1, 2], "rule": projection.RULE,
        "tasks": {
            name: {"topic": name, "classes": [f"{name} {c}" for c in range(task.classes)],
                   "train": 240, "test": len(task.truth)}
            for name, task in tasks.items()
        },
        "answers": [
            {"task": name, **row} for name, t in tasks.items() for row in table(t, t.predicted)
        ],
        "richness": [
            {"task": name, "probe": probe, **row}
            for probe in PROBES
            for name, task in tasks.items()
            for row in table(task, task.probed[probe])
        ],
        "claims": projection.claims(tasks, **FAST),
        "controls": projection.claims(tasks, projection.controls(["linear", "matched", "unseen"]), **FAST),
    }  # fmt: skip
    x = np.arange(layers) / layers
    shape = {"image": 0.72 + 0.12 * x - 0.2 * x**2, "last": 0.25 + 0.55 / (1 + np.exp(9 - 18 * x))}
    results["depth"] = [
        {"task": name, "variant": v, "tokens": kind, "layer": layer,
         "mean": float(curve[layer] + lift - 0.04 * i), "low": float(curve[layer] + lift - 0.1),
         "high": float(curve[layer] + lift - 0.04 * i + 0.05)}
        for i, name in enumerate(tasks)
        for v, lift in ((ORIGINAL, 0.0), (PROJ, -0.05), (E2E, 0.08))
        for kind, curve in shape.items()
        for layer in range(layers)
    ]  # fmt: skip
    results["factors"] = []
    for name, task in tasks.items():
        said = {
            recipe: answers(rng, task.truth, task.classes, 0.2 + 0.05 * i)
            for i, (recipe, *_) in enumerate(RECIPES)
        }
        rows = projection.table(task.truth, said, task.classes, over="official", **FAST)
        for row, (recipe, factor, setting) in zip(rows, RECIPES, strict=True):
            probe = {"mean": 0.6, "deviation": 0.02, "low": 0.55, "high": 0.66}
            results["factors"].append({
                "task": name, "recipe": recipe, "factor": factor, "setting": setting,
                "f1": row["f1"], "change": row["change"], "probe": probe,
            })  # fmt: skip
    results["neurons"] = []
    for i, name in enumerate(tasks):
        before = {"projector": rng.random((1, 576)) < 0.05, "lm": rng.random((layers, 96)) < 0.01}
        for v in (PROJ, E2E):
            for seed in (0, 1):
                after = {m: mask & (rng.random(mask.shape) < 0.7) for m, mask in before.items()}
                after = {m: mask | (rng.random(mask.shape) < 0.005 * (i + 1))
                         for m, mask in after.items()}  # fmt: skip
                for row in projection.moved(before, after):
                    results["neurons"].append({"task": name, "variant": v, "seed": seed, **row})
    results["changed"] = [
        {"task": name, "variant": E2E, "seed": 0, "domain neurons": when, "neurons": 90, "jaccard": 0.2,
         "chance": 0.01}
        for name in tasks
        for when in ("before", "after")
    ]  # fmt: skip
    digits = tasks["digits"]
    results["trained"] = [
        {"task": "digits", "variant": row["variant"], "neurons": None, "f1": row["f1"],
         "change": row["change"]}
        for row in table(digits, digits.predicted)
    ]  # fmt: skip
    results["ablation"] = []
    for name, task in tasks.items():
        for v in (ORIGINAL, E2E):
            said = {"none": task.predicted[v]}
            for off, loss in (("its domain's neurons", 0.3), ("random neurons", 0.03)):
                lost = rng.random(task.predicted[v].shape) < loss
                said[off] = np.where(lost, -1, task.predicted[v])
            rows = projection.table(task.truth, said, task.classes, over="none", **FAST)
            results["ablation"] += [
                {"task": name, "variant": v, "ablated": row["variant"], "neurons": 461,
                 "f1": row["f1"], "change": row["change"]}
                for row in rows[1:]
            ]  # fmt: skip
    two = projection.Task(rng.integers(0, 2, 60), 2, {})
    said = {"nothing": answers(rng, two.truth, 2, 0.9, 1)}
    offs = (("AurA against tulip", 0.5), ("AurA's gains shuffled", 0.05), ("random neurons", 0.02))
    for off, loss in offs:
        lost = (rng.random((1, 60)) < loss) & (two.truth == 0)
        said[off] = np.where(lost, 1, said["nothing"])
    rows = projection.table(two.truth, said, 2, over="nothing", **FAST)
    none = {"value": 0.0, "low": 0.0, "high": 0.0, "relative": 0.0, "equivalent": True}
    results["ablation"] += [
        {"task": "objects: tulip or rose", "variant": ORIGINAL, "ablated": row["variant"],
         "neurons": 0 if row["variant"] == "nothing" else 2211, "f1": row["f1"],
         "change": row["change"] or none,
         "recall": {name: float((said[row["variant"]][0] == c)[two.truth == c].mean())
                    for c, name in enumerate(("tulip", "rose"))}}
        for row in rows
    ]  # fmt: skip
    return results
