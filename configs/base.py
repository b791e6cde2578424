"""What the config files share: the fields of a study with their usual values.

A config file starts from one of these and changes what is its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections

# What the official FT-Proj of Cross-Modal Projection does differently from its paper, by factor.
OFFICIAL_PROJECTION = {
    "template": {"wording": "plain"},
    "end of turn": {"end": False},
    "crop": {"aspect": "square"},
    "rate": {"recipe": {"rate": 1e-3}},
}


def check_variant(file: str, variant: str, known: Sequence[str]) -> None:
    """Refuse a variant that the config file does not have.

    Args:
      file: name of the config file. variant: what stands after its colon.
      known: the variants it has.
    """
    if variant not in known:
        raise ValueError(f"configs/{file}:{variant} is none of {', '.join(known)}")


def embedded() -> ml_collections.ConfigDict:
    """The embedded model on the embedded domains."""
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.domains = ()  # some of the embedded domains; all five by default
    config.paths = ()  # or own domains: folders, .csv, .jsonl or conversations as .json
    return config


def domain_neurons() -> ml_collections.ConfigDict:
    """Domain neurons (MMNeuron, Huo et al., EMNLP 2024)."""
    config = ml_collections.ConfigDict()
    config.compat = ""  # "official": what the released code does, see docs/official.md
    config.selector = "entropy"  # or auroc, difference, attribution, random
    config.scope = "all"  # tokens that are counted: all, image, text, question, system
    config.thresholds = "module"  # neurons compete within a module, a layer, or all: global
    config.assign = "multiple"  # domains that a neuron may have; or single
    config.top_rate = 0.01
    config.filter_rate = 0.95
    config.bar_rate = 0.95
    config.masks = ""  # neurons to take instead: FILE.npz, or FOLDER/{module}.pth
    config.splits = 10  # of a domain's groups of examples into halves
    config.resamples = 100
    config.shuffles = 199  # of domain labels; 0 leaves splits, resamples and shuffles out
    config.level = 0.05  # chance of a false neuron under shuffled labels
    config.controls = 3  # seeds of random neurons, as many per layer
    config.train_tokens = 0  # tokens of the vision tower after which counting ends; 0 for none
    config.picture_layers = 4
    config.seed = 0
    return config


def mmneuron(procedure: str) -> ml_collections.ConfigDict:
    """MMNeuron on its own five data sets, as the paper or as the released code does it."""
    config = domain_neurons()
    config.vqa = ml_collections.ConfigDict()
    config.vqa.size = "paper"  # 10,001 and 1,001 examples of each; or full
    config.vqa.manual = ""  # where the downloads are, for those that are not built yet
    config.vqa.root = ""  # where data sets are built; the user's cache by default
    config.domains = ("lingoqa", "pmc_vqa", "rsvqa_hr", "vqav2", "docvqa")
    config.styles = ("choice", "open")  # whatever a data set asks
    config.compare = ("auroc", "difference", "random")  # selectors beside it
    config.groups = 16  # of a domain's examples, which are split, drawn again and shuffled
    config.measure = "answers"  # generated, judged by each data set's metric
    config.new_tokens = 64  # of an answer, at most
    config.judge = "wayveai/Lingo-Judge"  # or a folder
    config.judge_fallback = False  # words in common, where the judge is not at hand
    config.train_per_domain = 10_001
    config.test_per_domain = 1_001
    config.lens_per_domain = 200
    config.one_length = False  # prompts are padded to a few lengths, batch by batch
    if procedure == "official":
        config.compat = "official"
        config.train_tokens = 100_000
        config.groups = 5
        config.new_tokens = 400  # the release: 512 with the prompt among them
    return config


def projection() -> ml_collections.ConfigDict:
    """Cross-Modal Projection (Verma et al., ACL 2024)."""
    config = ml_collections.ConfigDict()
    config.paths = ()  # own tasks: folders, .csv or .jsonl files, whose labels are classes
    config.division = 0  # seed of the division into pictures to train on and held-out ones
    config.aspect = "pad"  # of the pictures that are evaluated: "square" crops them
    config.factors = ml_collections.ConfigDict()
    config.factors.seeds = (0,)
    config.factors.changes = ml_collections.ConfigDict(OFFICIAL_PROJECTION)
    config.factors.changes["start"] = {"start": "random"}
    config.neurons = ml_collections.ConfigDict()
    config.neurons.pictures = 0  # of each task that activations are counted on; 0 for no neurons
    config.neurons.top_rate = 0.01
    config.neurons.filter_rate = 0.95
    config.neurons.bar_rate = 0.95
    config.neurons.controls = 1  # seeds of random neurons, as many per layer
    config.suppress = ml_collections.ConfigDict()
    config.suppress.task = ""
    config.suppress.classes = ()  # two: the first is suppressed
    config.suppress.experts = 400
    return config


def fine_tuning(part: str, rate: float) -> ml_collections.ConfigDict:
    """How a model is fine-tuned in the projection study.

    Args:
      part: what trains, see mllm_jax/training/parts.py. rate: its peak learning rate.
    """
    setting = ml_collections.ConfigDict()
    setting.wording = "paper"  # "plain" shows the picture alone, as the official FT-Proj does
    setting.end = True  # whether the end of turn is learned
    setting.aspect = "pad"
    setting.start = "tuned"  # the projector before; or "random"
    setting.recipe = ml_collections.ConfigDict()
    setting.recipe.part = part
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
