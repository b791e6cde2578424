"""Where do visual attributes of a domain live after fine-tuning (Verma et al., ACL 2024)?

    python -m experiments.projection --config=configs/embedded_projection.py --workdir=DIR

On each classification task the model is asked as it is (Original), with its projector tuned to the
task (FT-Proj), and with projector and language model tuned (FT-E2E), several seeds each. Beside it
stands CLIP's zero-shot, where `config.clip` names a CLIP with both towers. Probes read the classes
from the features before and after the projection and after every layer. One setting of the recipe
at a time is changed (factors). The neurons of the tasks' domains (MMNeuron, Huo et al. 2024) are
found before and after each fine-tuning and switched off; a class is suppressed by AurA's gains
(Suau et al. 2024).

Leaves in the workdir: `results.json` (keys in mllm_jax/report/projection.py), `tables/*.csv`,
`figures/*.png`, `index.html`, `manifest.json`. A killed run continues and ends with the same bytes.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main(
        "experiments.projection", rows={"rows": 1, "proj.batch_size": 1, "e2e.batch_size": 1}
    )

import copy
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import study
from experiments.neurons import base
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import domain_neurons, probe, projection, selectors
from mllm_jax.analysis.projection import BEFORE, CLIP, E2E, ORIGINAL, PROJ
from mllm_jax.data import batching, classification, pooled, tasks
from mllm_jax.data import features as features_
from mllm_jax.data.embedded.questions import Question
from mllm_jax.evaluation import answers, zero_shot
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.tap import Taps
from mllm_jax.loading import clip
from mllm_jax.report import projection as page
from mllm_jax.sharding import hosts, mesh
from mllm_jax.training import batches, fit, start

SITES = {module: base.MODULES[module] for module in ("projector", "lm")}
DEPTH_KINDS = ("image", "last")
LOOK = "What is shown in the picture?"  # asked where the classes must not be named


@dataclasses.dataclass(frozen=True)
class Run:
    """One model of the study.

    Attributes:
      task: that it is for.
      variant: Original, FT-Proj, FT-E2E, or a recipe of the factors.
      seed: of its training and of the order of the classes in its prompts.
      setting: how it is fine-tuned; None is not at all.
    """

    task: str
    variant: str
    seed: int
    setting: Any = None

    @property
    def name(self) -> str:
        return f"{self.task}/{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Study:
    """What every step reads: the config, the folder, the model, and the tasks by name."""

    config: Any
    workdir: store.Workdir
    model: Any
    processor: Any
    tasks: dict[str, tasks.Task]

    def count(self, task: str, split: str) -> int:
        """How many pictures of a split are taken: the first, as classes alternate in it."""
        return min(getattr(self.config, f"{split}_per_task"), len(self.tasks[task][split]))

    def examples(self, task: str, split: str) -> list:
        """These pictures, read from disk."""
        return [self.tasks[task][split][i] for i in range(self.count(task, split))]

    def content(self) -> dict[str, list]:
        """Fingerprints of all pictures that are taken, and the classes, by task."""
        return {
            name: [task.topic, task.classes]
            + [study.content(self.examples(name, split)) for split in tasks.SPLITS]
            for name, task in self.tasks.items()
        }

    def ids(self, task: str, split: str) -> np.ndarray:
        """int32[N]: their classes."""
        return self.tasks[task].ids(split)[: self.count(task, split)]

    def features(self, task: str, split: str, aspect: str | None = None) -> np.ndarray:
        """float32[N, P, E]: what the vision tower gives, computed once."""
        aspect = aspect or self.config.aspect
        processor = copy.copy(self.processor)
        processor.image_aspect_ratio = aspect
        path = self.workdir / "features" / f"{task}-{split}-{aspect}.npy"
        return features_.vision_features(
            self.model, processor, self.examples(task, split), path, label=f"features, {task}"
        )

    def asked(self, task: tasks.Task, split: str, seed: int) -> batching.QuestionBatches:
        """The question for the class of each picture of a split."""
        pairs = [
            (e, answers.question(task, e, wording=self.config.wording, seed=seed))
            for e in self.examples(task.name, split)
        ]
        return self._asked(pairs, task.name, split, self._length(task, split))

    def shown(self, task: str, split: str, count: int) -> batching.QuestionBatches:
        """A question that is the same for all pictures and names no class."""
        pairs = [
            (e, Question("shown", LOOK, e.label, self.tasks[task].classes))
            for e in self.examples(task, split)[:count]
        ]
        return self._asked(pairs, task, split, batching.row_length(self.processor, pairs))

    def _asked(self, pairs, task: str, split: str, length: int) -> batching.QuestionBatches:
        features = self.features(task, split)[: len(pairs)]
        size = self.config.rows
        return batching.QuestionBatches(self.processor, pairs, size, length, features)

    def _length(self, task: tasks.Task, split: str) -> int:
        """Of all seeds, so that one program is for all."""
        return batching.row_length(
            self.processor,
            [
                (e, answers.question(task, e, wording=self.config.wording, seed=seed))
                for e in self.examples(task.name, split)
                for seed in self.config.seeds
            ],
        )

    def variants(self) -> dict[str, Any]:
        """How the models of the main tables are made."""
        return {ORIGINAL: None, PROJ: self.config.proj, E2E: self.config.e2e}


def run(config, workdir: store.Workdir) -> None:
    _check(config)
    model, processor = mj.load(config.model)
    this = Study(config, workdir, model, processor, _tasks(config))
    study.claim(workdir, config, model, processor, this.content())
    matched = match(this)
    found = {
        (run.task, run.variant, run.seed): measure(this, run)
        for run in (*_main_runs(this), *_factor_runs(this))
    }
    judged = {
        name: projection.Task(
            this.ids(name, "test"), len(task.classes), matched[name] | _said(this, found, name),
            {p: read(this, found, name, p) for p in ("paper", "linear", "matched")},
        )
        for name, task in this.tasks.items()
    }  # fmt: skip
    results = {
        "study": "projection",
        "model": config.model,
        "seeds": list(config.seeds),
        "tasks": {name: _about(this, name) for name in this.tasks},
        "answers": [row for name, task in judged.items() for row in _answer_rows(this, name, task)],
        "richness": [row for name, task in judged.items() for row in _probe_rows(name, task)],
        "claims": projection.claims(judged),
        "controls": projection.claims(judged, projection.controls(("linear", "matched"))),
        "rule": projection.RULE,
        "depth": [row for name in this.tasks for row in depth(this, found, name)],
        "factors": [row for name in config.factors.tasks for row in factors(this, found, name)],
        "neurons": list(moved(this, found)),
        "ablation": [*_ablation_rows(this, found), *suppress(this)],
        "losses": {run.name: found[run.task, run.variant, run.seed]["losses"].tolist()
                   for run in (*_main_runs(this), *_factor_runs(this)) if run.setting},
    }  # fmt: skip
    store.atomic_json(workdir / "results.json", results)
    page.write(workdir.path, results)
    store.write_manifest(workdir)
    print(f"finished: {workdir / 'index.html'}")


def _check(config) -> None:
    """What is wrong with a config is said before anything is read."""
    if unknown := [v for v in config.depth if v not in (ORIGINAL, PROJ, E2E)]:
        raise ValueError(f"config.depth: {unknown[0]} is none of {ORIGINAL}, {PROJ}, {E2E}")
    if unknown := [s for s in config.factors.seeds if s not in config.seeds]:
        raise ValueError(f"config.factors.seeds: {unknown[0]} is none of config.seeds")


def _tasks(config) -> dict[str, tasks.Task]:
    """Embedded tasks, those of the paper, or where `paths` names some the user's own."""
    if config.paths:
        own = study.domains_of(config, "train")
        return {name: tasks.Task.from_domain(domain) for name, domain in own.items()}
    if config.tasks and set(config.tasks) <= set(classification.NAMES):
        how = {"spelling": config.get("choices", "corrected"), "seed": config.division}
        return {name: classification.task(name, **how) for name in config.tasks}
    embedded = tasks.embedded(config.division)
    if unknown := [name for name in config.tasks if name not in embedded]:
        known = ", ".join((*embedded, *classification.NAMES))
        raise ValueError(f"config.tasks: {unknown[0]} is none of {known}")
    return {name: embedded[name] for name in config.tasks or embedded}


def _main_runs(this: Study) -> Iterator[Run]:
    for task in this.tasks:
        for variant, setting in this.variants().items():
            for seed in this.config.seeds:
                yield Run(task, variant, seed, setting)


def _factor_runs(this: Study) -> Iterator[Run]:
    for task in this.config.factors.tasks:
        for name in this.config.factors.changes:
            for seed in this.config.factors.seeds:
                yield Run(task, name, seed, _changed(this.config, name))


def _changed(config, name: str):
    """The recipe of FT-Proj with the settings of a factor."""
    setting = ml_collections.ConfigDict(config.proj.to_dict())
    setting.update(config.factors.changes[name])
    return setting


def match(this: Study) -> dict[str, dict[str, np.ndarray]]:
    """By task, {CLIP: int32[1, N]}: the class that it gives each test picture; {} with no CLIP."""
    if not this.config.clip:
        return {task: {} for task in this.tasks}

    def make() -> dict[str, np.ndarray]:
        model, processor = clip.load(this.config.clip)
        return {
            f"said/{name}": zero_shot.zero_shot(
                model, processor, (e.image for e in this.examples(name, "test")), task.classes
            )
            for name, task in this.tasks.items()
        }

    found = this.workdir.arrays("clip", make)
    return {task: {CLIP: found[f"said/{task}"][None]} for task in this.tasks}


class Tuned:
    """A run's model, fine-tuned when something that is not on disk asks for it."""

    def __init__(self, this: Study, run: Run):
        self.this, self.run = this, run
        self.folder = this.workdir / "checkpoints" / run.name

    @functools.cached_property
    def _fitted(self) -> tuple[Any, np.ndarray]:
        this, run, how = self.this, self.run, self.run.setting
        if how is None:
            return this.model, np.zeros(0, np.float32)
        recipe = fit.Recipe.of(how.recipe.to_dict())
        features = this.features(run.task, "train", how.aspect)
        count = how.steps * recipe.accumulate
        training = batches.AnswerBatches(
            this.processor, functools.partial(self._question, run.seed), features,
            size=how.batch_size, count=count, length=self._length(count, len(features)),
            seed=run.seed, end=how.end,
        )  # fmt: skip
        model = self._start(features)
        save = self.folder if this.config.checkpoints else None
        return fit.fit(model, training, recipe, save=save, label=run.name)

    @property
    def model(self):
        return self._fitted[0]

    @property
    def losses(self) -> np.ndarray:
        return self._fitted[1]

    def _question(self, seed: int, row: int, epoch: int) -> Question:
        return answers.question(
            self.this.tasks[self.run.task], self._examples[row], wording=self.run.setting.wording,
            seed=seed, epoch=epoch,
        )  # fmt: skip

    @functools.cached_property
    def _examples(self) -> list:
        return self.this.examples(self.run.task, "train")

    def _length(self, count: int, examples: int) -> int:
        """Of all seeds, so that they share one program."""
        epochs = -(-count * self.run.setting.batch_size // examples)
        pairs = [
            (None, self._question(seed, row, epoch))
            for seed in self.this.config.seeds
            for epoch in range(epochs)
            for row in range(examples)
        ]
        return batching.row_length(self.this.processor, pairs, answers=True)

    def _start(self, features: np.ndarray):
        """The model before it is tuned."""
        if self.run.setting.start == "tuned":
            return self.this.model
        model, _ = mj.load(self.this.config.model, projector="random", seed=self.run.seed)
        return start.scale_projector(model, np.asarray(features[:64]))

    def forget(self) -> None:
        """Removes the checkpoints: all that was asked of the model is on disk."""
        hosts.barrier(f"forget {self.run.name}")
        if hosts.is_primary():
            shutil.rmtree(self.folder, ignore_errors=True)


def measure(this: Study, run: Run) -> dict[str, np.ndarray]:
    """All that the study asks of one model, by name."""
    tuned, task = Tuned(this, run), this.tasks[run.task]

    def piece(name: str, make) -> dict[str, np.ndarray]:
        return this.workdir.arrays(f"runs/{run.name}/{name}", make)

    found = piece("losses", lambda: {"losses": tuned.losses})
    found |= piece("answers", lambda: {"said": said(this, tuned.model, task, run.seed)})
    found |= piece("projected", lambda: projected(this, tuned.model, run.task))
    first = run.variant in this.variants() and run.seed == this.config.seeds[0]
    deep = first and run.variant in this.config.depth
    if deep:
        found |= layers(this, tuned)
    if first and this.config.neurons.pictures:
        found |= piece("neurons", lambda: count(this, tuned.model))
    if deep and this.config.neurons.pictures:
        masks = domain_masks(this, found, run.task)
        for off, mask in {"own": masks, **_controls(this, masks)}.items():
            edits = base.off(mask)
            found |= piece(
                f"off-{off}",
                lambda off=off, e=edits: {f"off/{off}": said(this, tuned.model, task, run.seed, e)},
            )
    tuned.forget()
    return found


def said(this: Study, model, task: tasks.Task, seed: int, edits: Edits | None = None) -> np.ndarray:
    """int32[N]: the class that the model gives each test picture, -1 for none."""
    asked = this.asked(task, "test", seed)
    if this.config.answers == "free":
        return answers.parse_answers(answers.generate_answers(model, asked, edits), task.classes)
    return answers.score_classes(model, asked, edits).argmax(-1).astype(np.int32)


def projected(this: Study, model, task: str) -> dict[str, np.ndarray]:
    """float32[N, D] of each split: what the projector gives, mean over a picture's tokens."""
    found = {}
    for split in tasks.SPLITS:
        features = this.features(task, split)
        found[f"after/{split}"] = _by_parts(functools.partial(_projected, model), features)
    return found


def _by_parts(fn, features: np.ndarray, size: int = 32) -> np.ndarray:
    """fn(features) of a mapped file, some rows at a time."""
    starts = range(0, len(features), size)
    return np.concatenate([mesh.to_numpy(fn(np.asarray(features[i : i + size]))) for i in starts])


@jax.jit
def _projected(model, features):
    return model.projector(features, Taps().module("projector")).mean(1)


def layers(this: Study, tuned: Tuned) -> dict[str, np.ndarray]:
    """float32[N, L, D] of each split: what leaves each layer of the LM.

    Mean over the image tokens, and at the last token; mapped files.
    """
    run = tuned.run
    folder = this.workdir / "steps" / "runs" / run.name

    def make() -> bool:
        for split in tasks.SPLITS:
            asked = this.shown(run.task, split, this.count(run.task, split))
            pooled.pooled_features(
                tuned.model, this.processor, [e for e, _ in asked.pairs],
                [q.prompt for _, q in asked.pairs], folder / split, features=asked.features,
                batch_size=asked.size, length=asked.length,
            )  # fmt: skip
        return True

    this.workdir.json(f"runs/{run.name}/layers", make)
    return {
        f"{kind}/{split}": np.load(folder / split / f"lm.{kind}.npy", mmap_mode="r")
        for kind in DEPTH_KINDS
        for split in tasks.SPLITS
    }


def count(this: Study, model) -> dict[str, np.ndarray]:
    """Activation counts over the image tokens of each task's pictures, by module and task."""
    captures = {m: mj.stats(site, where=tok.image) for m, site in SITES.items()}
    found = {}
    for name in this.tasks:
        asked = this.shown(name, "train", this.config.neurons.pictures)
        total = mj.reduce(captures, model, asked, label=f"count, {name}")
        for module, stats in total.items():
            found[f"positive/{module}/{name}"] = stats.positive
            found[f"tokens/{module}/{name}"] = stats.tokens[0]
    return found


def domain_masks(this: Study, found: Mapping[str, np.ndarray], task: str) -> dict[str, np.ndarray]:
    """bool[L, F] of each module: the neurons of a task's domain among all tasks'."""
    rates, names = this.config.neurons, list(this.tasks)
    selected = domain_neurons.select_modules(
        {m: np.stack([found[f"positive/{m}/{name}"] for name in names]) for m in SITES},
        {m: np.stack([found[f"tokens/{m}/{name}"] for name in names]) for m in SITES},
        names=names, top_rate=rates.top_rate, filter_rate=rates.filter_rate,
        bar_rate=rates.bar_rate,
    )  # fmt: skip
    return {module: chosen.mask[names.index(task)] for module, chosen in selected.items()}


def _controls(this: Study, masks: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Random neurons, as many in every layer."""
    return {
        f"random{seed}": {m: domain_neurons.random_mask_like(a, seed) for m, a in masks.items()}
        for seed in range(this.config.neurons.controls)
    }


Found = Mapping[tuple[str, str, int], Mapping[str, np.ndarray]]


def _over_seeds(found: Found, task: str, variant: str, seeds, key: str) -> np.ndarray:
    return np.stack([found[task, variant, seed][key] for seed in seeds])


def _said(this: Study, found: Found, task: str) -> dict[str, np.ndarray]:
    """int[R, N]: the answers of each variant."""
    seeds = this.config.seeds
    return {v: _over_seeds(found, task, v, seeds, "said") for v in this.variants()}


def read(this: Study, found: Found, task: str, name: str, variants=None) -> dict[str, np.ndarray]:
    """int32[R, N]: the class that a probe reads from each picture, on both sides of projectors.

    Args:
      name: "paper", "linear" or "matched".
      variants: runs whose projector is read; those of the main tables by default, and "before".
    """
    named, seeds = variants or tuple(this.variants()), this.config.seeds
    if variants:
        seeds = this.config.factors.seeds
    after = found[task, named[0], seeds[0]]["after/train"]
    width = this.features(task, "train").shape[-1]
    kinds = _probes(this.config, width, after.shape[-1])[name]

    def fit_to(kind: probe.Probe, sites: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
        parts = [probe.Part(sites[s], this.ids(task, s)) for s in tasks.SPLITS]
        classes = len(this.tasks[task].classes)
        return probe.fit(kind, *parts, classes=classes, seeds=(seed,)).predicted

    def make() -> dict[str, np.ndarray]:
        made = {}
        if not variants:
            before = {
                s: _by_parts(lambda x: x.mean(1), this.features(task, s)) for s in tasks.SPLITS
            }
            made[BEFORE] = np.concatenate([fit_to(kinds[0], before, seed) for seed in seeds])
        by_seed = []
        for seed in seeds:  # the variants side by side
            sites = {
                s: np.stack([found[task, v, seed][f"after/{s}"] for v in named])
                for s in tasks.SPLITS
            }
            by_seed.append(fit_to(kinds[1], sites, seed)[:, 0])
        return made | dict(zip(named, np.stack(by_seed, 1), strict=True))

    return this.workdir.arrays(f"probes/{task}-{name}{'-factors' if variants else ''}", make)


def _probes(config, before: int, after: int) -> dict[str, tuple[probe.Probe, probe.Probe]]:
    """The probes before and after the projection, of features so wide."""
    how = {"epochs": config.probe.epochs, "patience": config.probe.patience}
    paper = {**how, "rate": config.probe.rate, "batch": config.probe.batch}
    same = probe.matched(before, after)
    return {
        "paper": (
            dataclasses.replace(probe.BEFORE, **paper), dataclasses.replace(probe.AFTER, **paper),
        ),
        "linear": (dataclasses.replace(probe.LINEAR, **how),) * 2,
        "matched": (dataclasses.replace(same, **how),) * 2,
    }  # fmt: skip


def _about(this: Study, name: str) -> dict[str, Any]:
    task = this.tasks[name]
    return {
        "topic": task.topic,
        "classes": list(task.classes),
        **{split: this.count(name, split) for split in tasks.SPLITS},
    }


def _answer_rows(this: Study, name: str, task: projection.Task) -> list[dict]:
    """Table 1: the uniform baseline, CLIP if there is one, and the model of each variant."""
    random = projection.uniform(len(task.truth), task.classes, len(this.config.seeds))
    rows = projection.table(
        task.truth, {"Random": random, **task.said}, task.classes, over=ORIGINAL
    )
    return [{"task": name, **row} for row in rows]


def _probe_rows(name: str, task: projection.Task) -> Iterator[dict]:
    """Tables 2 and 3."""
    for kind, predicted in task.probed.items():
        for row in projection.table(task.truth, predicted, task.classes, over=ORIGINAL):
            yield {"task": name, "probe": kind, **row}


def depth(this: Study, found: Found, task: str) -> Iterator[dict]:
    """F1 of a linear probe after each layer."""
    truth, classes = this.ids(task, "test"), len(this.tasks[task].classes)
    how = {"epochs": this.config.probe.epochs, "patience": this.config.probe.patience}
    for variant, kind in itertools.product(this.config.depth, DEPTH_KINDS):
        own = found[task, variant, this.config.seeds[0]]

        def make(own=own, kind=kind):
            parts = [
                probe.Part(own[f"{kind}/{s}"].swapaxes(0, 1), this.ids(task, s))
                for s in tasks.SPLITS
            ]
            linear = dataclasses.replace(probe.LINEAR, **how)
            fitted = probe.fit(linear, *parts, classes=classes, seeds=tuple(this.config.seeds))
            return {"predicted": fitted.predicted}

        read = this.workdir.arrays(f"probes/{task}-{variant}-{kind}", make)["predicted"]
        for layer, predicted in enumerate(read):
            value = projection.f1(truth, predicted, classes).row()
            yield {"task": task, "variant": variant, "tokens": kind, "layer": layer, **value}


def factors(this: Study, found: Found, task: str) -> Iterator[dict]:
    """What each setting of the recipe of FT-Proj changes, against the recipe as it is."""
    seeds, changes = this.config.factors.seeds, this.config.factors.changes
    truth, classes = this.ids(task, "test"), len(this.tasks[task].classes)
    recipes = (PROJ, *changes)
    probed = read(this, found, task, "paper", recipes)
    scores = {
        name: projection.f1(truth, _over_seeds(found, task, name, seeds, "said"), classes)
        for name in recipes
    }
    for name in recipes:
        yield {
            "task": task,
            "recipe": name,
            "factor": "" if name == PROJ else name,
            "setting": "" if name == PROJ else _words(changes[name].to_dict()),
            "f1": scores[name].row(),
            "change": None if name == PROJ else projection.change(scores[name], scores[PROJ]),
            "probe": projection.f1(truth, probed[name], classes).row(),
        }


def _words(settings: Mapping[str, Any]) -> str:
    """{"recipe": {"rate": 0.1}, "end": False} as "rate 0.1, end False"."""
    flat = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    for value in settings.values():
        flat |= value if isinstance(value, Mapping) else {}
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def moved(this: Study, found: Found) -> Iterator[dict]:
    """How the neurons of each task's domain moved in the model that was tuned to it."""
    if not this.config.neurons.pictures:
        return
    seed = this.config.seeds[0]
    for task in this.tasks:
        before = domain_masks(this, found[task, ORIGINAL, seed], task)
        for variant in (PROJ, E2E):
            after = domain_masks(this, found[task, variant, seed], task)
            for row in projection.moved(before, after):
                yield {"task": task, "variant": variant, **row}


def _ablation_rows(this: Study, found: Found) -> Iterator[dict]:
    """F1 with the neurons of a task's domain off, and with random ones."""
    if not this.config.neurons.pictures:
        return
    seed = this.config.seeds[0]
    for task in this.tasks:
        truth, classes = this.ids(task, "test"), len(this.tasks[task].classes)
        for variant in this.config.depth:
            own = found[task, variant, seed]
            neurons = sum(int(m.sum()) for m in domain_masks(this, own, task).values())
            random = [own[f"off/random{i}"] for i in range(this.config.neurons.controls)]
            offs = {"its domain's neurons": own["off/own"][None]}
            if random:
                offs["random neurons"] = np.stack(random)
            clean = projection.f1(truth, own["said"][None], classes)
            for off, predicted in offs.items():
                value = projection.f1(truth, predicted, classes)
                row = {"task": task, "variant": variant, "off": off, "neurons": neurons}
                yield row | {"f1": value.row(), "change": projection.change(value, clean)}


def suppress(this: Study) -> Iterator[dict]:
    """One of two classes suppressed: AurA's gains, the best experts off, and random controls.

    Yields:
      Rows as those of the ablation, with the share of each class's pictures called by its name.
    """
    how, model = this.config.suppress, this.model
    if not how.task:
        return
    task = dataclasses.replace(this.tasks[how.task], classes=tuple(how.classes))
    train, test = (_two_classes(this, task, split) for split in ("train", "test"))
    truth = {name: np.array([task.classes.index(e.label) for e, _ in asked.pairs])
             for name, asked in (("train", train), ("test", test))}  # fmt: skip
    responses = this.workdir.arrays("suppress/responses", lambda: _responses(model, train))
    expertise = selectors.auroc(responses["mean"], truth["train"])
    gains = selectors.aura_gain(expertise[0])
    experts = selectors.top(expertise, how.experts)[0]
    shuffled = np.random.default_rng(0).permuted(gains, axis=-1)
    random = domain_neurons.random_mask_like(experts, 0)
    act = S.lm.mlp.act
    edits = {
        "nothing": (0, Edits()),
        f"AurA against {task.classes[0]}": (int((gains < 1).sum()), mj.scale(act, gains)),
        "AurA's gains shuffled": (int((shuffled < 1).sum()), mj.scale(act, shuffled)),
        f"experts on {task.classes[0]}": (int(experts.sum()), mj.ablate(act[experts])),
        "random neurons": (int(random.sum()), mj.ablate(act[random])),
    }
    clean = None
    for number, (off, (neurons, edit)) in enumerate(edits.items()):
        predicted = this.workdir.arrays(
            f"suppress/{number}",
            lambda e=edit: {
                "said": answers.score_classes(model, test, e).argmax(-1).astype(np.int32)
            },
        )["said"]
        value = projection.f1(truth["test"], predicted[None], len(task.classes))
        clean = clean or value
        yield {
            "task": f"{task.name}: {' or '.join(task.classes)}", "variant": ORIGINAL, "off": off,
            "neurons": neurons, "f1": value.row(), "change": projection.change(value, clean),
            "called": {
                name: float((predicted == c)[truth["test"] == c].mean())
                for c, name in enumerate(task.classes)
            },
        }  # fmt: skip


def _two_classes(this: Study, task: tasks.Task, split: str) -> batching.QuestionBatches:
    """The pictures of these classes alone, asked for one of them."""
    examples = this.examples(task.name, split)
    at = [i for i, example in enumerate(examples) if example.label in task.classes]
    how = {"wording": this.config.wording, "seed": this.config.seeds[0]}
    pairs = [(examples[i], answers.question(task, examples[i], **how)) for i in at]
    length = batching.row_length(this.processor, pairs)
    features = this.features(task.name, split)[at]
    return batching.QuestionBatches(this.processor, pairs, this.config.rows, length, features)


def _responses(model, asked: batching.QuestionBatches) -> dict[str, np.ndarray]:
    """float32[N, L, F]: of each picture, a neuron's mean over the image tokens."""
    capture = {"mean": mj.mean(S.lm.mlp.act, where=tok.image)}
    found = [
        np.asarray(mj.run(model, asked[i], None, capture, logits="none")["mean"])
        for i in range(len(asked))
    ]
    rows = [part.swapaxes(0, 1)[: len(asked.rows(i))] for i, part in enumerate(found)]
    return {"mean": np.concatenate(rows)}
