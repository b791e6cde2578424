"""Paper B (cross-modal projection, Verma et al. 2024) on the embedded model and four tasks.

    python -m experiments.projection --config=configs/embedded_projection.py --workdir=DIR
    python -m experiments.projection --config=configs/embedded_projection.py:quick --workdir=DIR
    python -m experiments.projection --config=configs/embedded_projection.py:official --workdir=DIR

The recipe is LLaVA's with the traps of the official FT-Proj taken out: its prompt and template are
those of the evaluation, pictures are padded on both sides, the end of turn is learned, the rate is
one for a projector that is tuned already. `official` sets them as the official scripts do, and
`factors` does so one by one. Steps are few: the classes alone are learned, on 96 pictures a task.
The LM learns at the paper's rate, and its projector at one of its own. What it finds, and how long
it takes: docs/projection.md.
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    base.check_variant("embedded_projection.py", size, ("full", "quick", "official"))
    config = base.projection()
    config.model = "embedded"
    config.clip = ""  # a CLIP with its text tower, for its zero-shot: no package has one
    config.tasks = ()  # some of the embedded tasks; all four by default
    config.seeds = (0, 1, 2)  # of training, of the order of classes in prompts, of probes
    config.train_per_task = 96
    config.held_per_task = 24
    config.test_per_task = 64
    config.wording = "paper"  # of the questions that are evaluated
    config.answers = "scores"  # the most likely class; "free" reads what the model says
    config.rows = 8  # of a batch, where nothing is trained
    config.checkpoints = False  # of training: these runs are shorter than their files are large
    config.proj = _setting("projector", rate=2e-4)
    config.e2e = _setting("projector+lm", rate=2e-5)
    config.e2e.recipe.projector_rate = 3e-4
    config.probe = ml_collections.ConfigDict()
    config.probe.rate = 1e-4  # rate and batch are of the paper's probes
    config.probe.batch = 128
    config.probe.epochs = 100
    config.probe.patience = 10
    config.depth = ("Original", "FT-E2E")  # variants whose layers are probed, and neurons are off
    config.factors.tasks = ("documents",)
    config.factors.changes["all of them"] = _all(base.OFFICIAL_PROJECTION)
    config.neurons.pictures = 16
    config.suppress.task = "documents"
    config.suppress.classes = ("sheet music", "text")
    if size == "official":
        config.proj.update(_all(base.OFFICIAL_PROJECTION))
        config.factors.tasks = ()
    if size == "quick":
        config.tasks = ("astronomy", "documents")
        config.seeds = (0,)
        config.train_per_task = 24
        config.held_per_task = 12
        config.test_per_task = 16
        config.proj.steps = config.e2e.steps = 6
        config.probe.epochs = 30
        config.depth = ("Original",)
        config.factors.tasks = ()
        config.neurons.pictures = 8
        config.suppress.task = ""
    return config


def _all(changes: dict) -> dict:
    return {name: value for change in changes.values() for name, value in change.items()}


def _setting(part: str, rate: float) -> ml_collections.ConfigDict:
    setting = base.fine_tuning(part, rate)
    setting.batch_size = 4
    setting.steps = 24
    return setting
