"""MMNeuron (Huo et al., EMNLP 2024) on the embedded model and the five embedded domains.

python -m experiments.domain_neurons --config=configs/embedded.py --workdir=DIR
python -m experiments.domain_neurons --config=configs/embedded.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded.py", size, ("full", "quick"))
    config = base.embedded()
    config.update(base.domain_neurons())
    config.styles = ("category", "choice", "yesno", "kind")  # one question per picture, in turn
    config.compare = ("auroc", "difference", "attribution", "random")  # also compared
    config.groups = 15  # of a domain's examples, which are split, resampled and shuffled
    config.measure = "options"  # or "answers": generated answers, for the data sets of MMNeuron
    config.modules = ("vision", "projector", "lm", "all")  # to ablate; join several by +
    config.train_per_domain = 120
    config.test_per_domain = 60
    config.lens_per_domain = 32
    config.one_length = True  # pad all prompts to one length, which requires reading them first
    config.batch_size = 8
    config.deviation_layers = 30  # all of them
    if size == "quick":
        config.train_per_domain = 16
        config.groups = 8
        config.test_per_domain = 8
        config.lens_per_domain = 8
        config.modules = ("all",)
        config.compare = ("auroc", "difference", "random")
        config.shuffles = 99
        config.lens_sites = ()  # each takes as long as the lens at the end of the blocks
        config.controls = 3  # too few draws for narrow intervals
        config.random_controls = 2
        config.entropy_controls = 0
        config.evidence_per_domain = 8
        config.evidence_effects = False
        config.evidence_exact = 0
    return config
