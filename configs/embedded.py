"""Paper A (MMNeuron) on the embedded model and the five embedded domains.

python -m experiments.domain_neurons --config=configs/embedded.py --workdir=DIR
python -m experiments.domain_neurons --config=configs/embedded.py:quick --workdir=DIR
"""

import ml_collections


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "quick"):
        raise ValueError(f"configs/embedded.py:{size} is none of full, quick")
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.domains = ()  # some of the embedded domains; all five by default
    config.paths = ()  # or own domains: folders, .csv or .jsonl files
    config.styles = ("category", "choice", "yesno", "kind")  # one question a picture, in turn
    config.scope = "all"  # tokens that are counted: all, image, question, system
    config.top_rate = 0.01
    config.filter_rate = 0.95
    config.bar_rate = 0.95
    config.modules = ("vision", "projector", "lm", "all")
    config.controls = 3  # seeds of random neurons, as many per layer
    config.train_per_domain = 120
    config.test_per_domain = 60
    config.lens_per_domain = 32
    config.picture_layers = 4
    config.batch_size = 8
    config.seed = 0
    if size == "quick":
        config.train_per_domain = 16
        config.test_per_domain = 8
        config.lens_per_domain = 8
        config.modules = ("all",)
    return config
