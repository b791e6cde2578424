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


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "quick", "official"):
        raise ValueError(f"configs/embedded_projection.py:{size} is none of full, quick, official")
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.clip = ""  # a CLIP with its text tower, for its zero-shot: no package has one
    config.tasks = ()  # some of the embedded tasks; all four by default
    config.paths = ()  # or own tasks: folders, .csv or .jsonl files, whose labels are classes
    config.division = 0  # seed of the division into pictures to train on and held-out ones
    config.seeds = (0, 1, 2)  # of training, of the order of classes in prompts, of probes
    config.train_per_task = 96
    config.held_per_task = 24
    config.test_per_task = 64
    config.wording = "paper"  # of the questions that are evaluated
    config.aspect = "pad"  # of the pictures that are evaluated: "square" crops them
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
    config.factors = ml_collections.ConfigDict()
    config.factors.tasks = ("documents",)
    config.factors.seeds = (0,)
    config.factors.changes = ml_collections.ConfigDict(OFFICIAL)
    config.factors.changes["all of them"] = _all(OFFICIAL)
    config.factors.changes["start"] = {"start": "random"}
    config.neurons = ml_collections.ConfigDict()
    config.neurons.pictures = 16  # of each task that activations are counted on; 0 for no neurons
    config.neurons.top_rate = 0.01
    config.neurons.filter_rate = 0.95
    config.neurons.bar_rate = 0.95
    config.neurons.controls = 1  # seeds of random neurons, as many per layer
    config.suppress = ml_collections.ConfigDict()
    config.suppress.task = "documents"
    config.suppress.classes = ("sheet music", "text")  # the first is suppressed
    config.suppress.experts = 400
    if size == "official":
        config.proj.update(_all(OFFICIAL))
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


# What the official FT-Proj does otherwise (facts B.2.3), by factor.
OFFICIAL = {
    "template": {"wording": "plain"},
    "end of turn": {"end": False},
    "crop": {"aspect": "square"},
    "rate": {"recipe": {"rate": 1e-3}},
}


def _all(changes: dict) -> dict:
    return {name: value for change in changes.values() for name, value in change.items()}


def _setting(part: str, rate: float) -> ml_collections.ConfigDict:
    """How a model is fine-tuned."""
    setting = ml_collections.ConfigDict()
    setting.wording = "paper"  # "plain" shows the picture alone, as the official FT-Proj does
    setting.end = True  # whether the end of turn is learned
    setting.aspect = "pad"
    setting.start = "tuned"  # the projector before; or "random"
    setting.batch_size = 4
    setting.steps = 24
    setting.recipe = ml_collections.ConfigDict()
    setting.recipe.part = part  # or "projector+lora", see mllm_jax/training/parts.py
    setting.recipe.rate = rate
    setting.recipe.projector_rate = ml_collections.config_dict.placeholder(float)
    setting.recipe.lora = ml_collections.ConfigDict({"rank": 8, "alpha": 16.0})
    setting.recipe.warmup = 0.03
    setting.recipe.weight_decay = 0.0
    setting.recipe.clip = 1.0
    setting.recipe.accumulate = 1
    setting.recipe.remat = False
    setting.recipe.every = 50
    return setting
