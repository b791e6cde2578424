"""Paper A (MMNeuron) on the embedded model and the five embedded domains.

python -m experiments.domain_neurons --config=configs/embedded.py --workdir=DIR
python -m experiments.domain_neurons --config=configs/embedded.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    base.check_variant("embedded.py", size, ("full", "quick"))
    config = base.embedded()
    config.update(base.domain_neurons())
    config.styles = ("category", "choice", "yesno", "kind")  # one question a picture, in turn
    config.compare = ("auroc", "difference", "attribution", "random")  # selectors beside it
    config.groups = 15  # of a domain's examples, which are split, drawn again and shuffled
    config.measure = "options"  # or answers, which are generated: of the data sets of MMNeuron
    config.modules = ("vision", "projector", "lm", "all")  # cut; several are joined by +
    config.train_per_domain = 120
    config.test_per_domain = 60
    config.lens_per_domain = 32
    config.one_length = True  # all prompts padded alike, for which they are read beforehand
    config.batch_size = 8
    if size == "quick":
        config.train_per_domain = 16
        config.groups = 8
        config.test_per_domain = 8
        config.lens_per_domain = 8
        config.modules = ("all",)
        config.compare = ("auroc", "difference", "random")
        config.shuffles = 99
    return config
