"""Fields that config files share, with their default values.

A config file starts from one of these functions and changes the fields that differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections

# Differences of the official FT-Proj of Cross-Modal Projection from its paper, by factor.
OFFICIAL_PROJECTION = {
    "template": {"wording": "plain"},
    "end of turn": {"end": False},
    "crop": {"aspect": "square"},
    "rate": {"recipe": {"rate": 1e-3}},
}


def check_variant(file: str, variant: str, known: Sequence[str]) -> None:
    """Refuse a variant that the config file does not have.

    Args:
      file: The name of the config file.
      variant: The text after the colon of `--config`.
      known: The variants that the file has.

    Raises:
      ValueError: The variant is unknown.
    """
    if variant not in known:
        raise ValueError(f"configs/{file}:{variant} is not one of {', '.join(known)}")


def embedded() -> ml_collections.ConfigDict:
    """Return the fields of a study of the embedded model on the embedded domains."""
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.domains = ()  # a subset of the embedded domains; empty for all five
    config.paths = ()  # or your own domains: folders, .csv, .jsonl, or conversations as .json
    return config


def domain_neurons() -> ml_collections.ConfigDict:
    """Return the fields of the study of domain neurons (MMNeuron, Huo et al., EMNLP 2024)."""
    config = ml_collections.ConfigDict()
    config.compat = ""  # "official" follows the released code, see docs/official.md
    config.selector = "entropy"  # or auroc, difference, attribution, random
    config.auroc_pictures = 200  # of each domain, on which AUROC ranks neurons
    config.prompts = "neutral"  # of counted pictures; or released: the domain's questions
    config.scope = "image"  # tokens to count: all, image, text, question, system
    config.thresholds = "module"  # neurons are ranked within a module or layer, or "global"
    config.assign = "multiple"  # number of domains a neuron may have; or single
    config.top_rate = 0.01
    config.filter_rate = 0.95
    config.bar_rate = 0.95
    config.masks = ""  # neurons to use instead: FILE.npz, or FOLDER/{module}.pth
    config.ablate = "selected"  # or "tested": only those that are beyond chance
    config.splits = 10  # random halves of a domain's groups of examples
    config.resamples = 100
    config.shuffles = 199  # of domain labels; 0 skips splits, resamples and shuffles
    config.level = 0.05  # probability of a false neuron under shuffled labels
    config.controls = 10  # draws of neurons of the same layers, activation rates and means
    config.random_controls = 3  # draws of any neurons of the same layers
    config.entropy_controls = (
        3  # draws of neurons of the same layers, equally active in all domains
    )
    config.margin = 0.05  # the largest effect that counts as none: share of answers, or deviation
    config.train_tokens = 0  # vision-tower tokens after which counting stops; 0 for no limit
    config.evidence_neurons = 20  # of a domain and module, shown one by one; 0 for none
    config.evidence_per_domain = 100  # training pictures searched for their strongest tokens
    config.evidence_effects = True  # also first-order effects: of each neuron, and of each patch
    config.evidence_exact = 5  # neurons of a domain and module that are also ablated one by one
    config.lens_sites = ("resid_mid", "attn_out", "mlp.out")  # besides resid_post
    config.picture_layers = 5  # of the figures
    config.deviation_layers = 8  # number of layers whose states are compared; kept for two passes
    config.seed = 0
    return config


def mmneuron(procedure: str) -> ml_collections.ConfigDict:
    """Return the fields of MMNeuron on its own five data sets.

    Args:
      procedure: "paper", or "official" for the procedure of the released code.
    """
    config = domain_neurons()
    config.vqa = ml_collections.ConfigDict()
    config.vqa.size = "paper"  # 10,001 and 1,001 examples of each data set; or full
    config.vqa.manual = ""  # folder of the downloads, for data sets that are not built yet
    config.vqa.root = ""  # folder of the built data sets; empty for the user's cache
    config.domains = ("lingoqa", "pmc_vqa", "rsvqa_hr", "vqav2", "docvqa")
    config.styles = ("choice", "open")  # both question styles of the data sets
    config.compare = ("auroc", "difference", "random")  # further selectors, for comparison
    config.groups = 16  # of a domain's examples, which are split, resampled and shuffled
    config.measure = "answers"  # generated answers, scored by each data set's metric
    config.new_tokens = 64  # maximum length of an answer
    config.judge = "wayveai/Lingo-Judge"  # or a folder
    config.judge_fallback = False  # whether to use token F1 if the judge is not available
    config.train_per_domain = 10_001
    config.test_per_domain = 1_001
    config.lens_per_domain = 200
    config.one_length = False  # pad prompts to a few lengths, batch by batch
    if procedure == "official":
        config.compat = "official"
        config.prompts = "released"
        config.scope = "all"
        config.train_tokens = 100_000
        config.groups = 5
        config.new_tokens = 400  # the release: 512 including the prompt
    return config


def projection() -> ml_collections.ConfigDict:
    """Return the fields of Cross-Modal Projection (Verma et al., ACL 2024)."""
    config = ml_collections.ConfigDict()
    config.paths = ()  # your own tasks: folders, .csv or .jsonl files, whose labels are the classes
    config.projector = ""  # a projector file, such as one that was trained without a domain
    config.division = 0  # seed of the division into training and held-out pictures
    config.aspect = "pad"  # of the evaluated pictures: "pad", or "square" to crop
    config.factors = ml_collections.ConfigDict()
    config.factors.seeds = (0,)
    config.factors.changes = ml_collections.ConfigDict(OFFICIAL_PROJECTION)
    config.factors.changes["start"] = {"start": "random"}
    config.neurons = ml_collections.ConfigDict()
    config.neurons.pictures = 0  # pictures of each task to count activations on; 0 skips neurons
    config.neurons.top_rate = 0.01
    config.neurons.filter_rate = 0.95
    config.neurons.bar_rate = 0.95
    config.neurons.train = ()  # tasks for which only domain neurons, and random ones, are trained
    config.neurons.rate = 2e-4  # learning rate of these neurons
    config.neurons.controls = 1  # seeds of random neurons, the same number in each layer
    config.suppress = ml_collections.ConfigDict()
    config.suppress.task = ""
    config.suppress.classes = ()  # two classes, of which the first is suppressed
    config.suppress.experts = 400
    return config


def fine_tuning(part: str, rate: float) -> ml_collections.ConfigDict:
    """Return the settings of fine-tuning in the projection study.

    Args:
      part: The trained part, see mllm_jax/training/parts.py.
      rate: The peak learning rate.
    """
    setting = ml_collections.ConfigDict()
    setting.wording = "paper"  # "plain" shows only the picture, as the official FT-Proj does
    setting.end = True  # whether the loss includes the end-of-turn token
    setting.aspect = "pad"
    setting.start = "tuned"  # the projector of the model; or "random"
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
