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
    config.compat = ""  # "official": what the released code does, see docs/official.md
    config.selector = "entropy"  # or auroc, difference, attribution, random
    config.scope = "all"  # tokens that are counted: all, image, text, question, system
    config.thresholds = "module"  # neurons compete within a module, a layer, or all: global
    config.assign = "multiple"  # domains that a neuron may have; or single
    config.top_rate = 0.01
    config.filter_rate = 0.95
    config.bar_rate = 0.95
    config.masks = ""  # neurons to take instead: FILE.npz, or FOLDER/{module}.pth
    config.compare = ("auroc", "difference", "attribution", "random")  # selectors beside it
    config.groups = 15  # of a domain's examples, which are split, drawn again and shuffled
    config.splits = 10  # into halves
    config.resamples = 100
    config.shuffles = 199  # of domain labels; 0 leaves all three out
    config.level = 0.05  # chance of a false neuron under shuffled labels
    config.measure = "options"  # or answers, which are generated: of the data sets of paper A
    config.modules = ("vision", "projector", "lm", "all")  # cut; several are joined by +
    config.controls = 3  # seeds of random neurons, as many per layer
    config.train_per_domain = 120
    config.train_tokens = 0  # tokens of the vision tower after which counting ends; 0 for none
    config.test_per_domain = 60
    config.lens_per_domain = 32
    config.picture_layers = 4
    config.one_length = True  # all prompts padded alike, for which they are read beforehand
    config.batch_size = 8
    config.seed = 0
    if size == "quick":
        config.train_per_domain = 16
        config.groups = 8
        config.test_per_domain = 8
        config.lens_per_domain = 8
        config.modules = ("all",)
        config.compare = ("auroc", "difference", "random")
        config.shuffles = 99
    return config
