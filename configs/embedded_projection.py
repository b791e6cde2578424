"""Cross-Modal Projection (Verma et al., ACL 2024) on the embedded model and four tasks.

    python -m experiments.projection --config=configs/embedded_projection.py --workdir=DIR
    python -m experiments.projection --config=configs/embedded_projection.py:quick --workdir=DIR
    python -m experiments.projection --config=configs/embedded_projection.py:official --workdir=DIR

The recipe is LLaVA's without the problems of the official FT-Proj: prompt and template equal those
of the evaluation, pictures are padded in training and evaluation, the end of turn is learned, and
the learning rate suits a projector that is already trained. `official` uses the settings of the
official scripts, and `factors` applies them one by one. Few steps suffice, because only the classes
are learned, on 96 pictures for each task. The language model trains at the paper's learning rate
and the projector at its own. docs/projection.md states the results and the time.
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_projection.py", size, ("full", "quick", "official"))
    config = base.projection()
    config.model = "embedded"
    config.clip = ""  # a CLIP with its text tower, for zero-shot; no package contains one
    config.tasks = ()  # a subset of the embedded tasks; empty for all four
    config.seeds = (0, 1, 2)  # of training, of the order of classes in prompts, of probes
    config.train_per_task = 96
    config.held_per_task = 24
    config.test_per_task = 64
    config.wording = "paper"  # of the evaluated questions
    config.answers = "scores"  # the most probable class; "free" parses generated text
    config.rows = 8  # of a batch in evaluation
    config.checkpoints = False  # of training; these short runs do not need them
    config.proj = _setting("projector", rate=2e-4)
    config.e2e = _setting("projector+lm", rate=2e-5)
    config.e2e.recipe.projector_rate = 2e-4  # as FT-Proj's
    config.probe = ml_collections.ConfigDict()
    config.probe.rate = 1e-4  # learning rate and batch size of the paper's probes
    config.probe.batch = 128
    config.probe.epochs = 100
    config.probe.patience = 10
    config.depth = ("Original", "FT-E2E")  # variants whose layers are probed and neurons ablated
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
