"""The neurons of the embedded model that produce its answers, by attribution.

python -m experiments.attribution --config=configs/embedded_attribution.py --workdir=DIR
python -m experiments.attribution --config=configs/embedded_attribution.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_attribution.py", size, ("full", "quick"))
    config = base.embedded()
    config.styles = ("choice", "category")  # one question for each picture, in turn
    config.site = "lm.mlp.act"  # or lm.attn.heads, vision.mlp.act, projector.act, ...
    config.metric = "difference"  # between the correct and a wrong option; or "answer"
    config.steps = 8  # of integrated gradients, more are more accurate; 0 for first order
    config.train_per_domain = 24
    config.test_per_domain = 24
    config.top = 50  # number of units to list
    config.off = (10, 100, 1000)  # numbers of units to ablate
    config.controls = 2  # seeds of random units, the same number in each layer
    config.batch_size = 4
    if size == "quick":
        config.steps = 2
        config.train_per_domain = 4
        config.test_per_domain = 4
        config.off = (10, 100)
        config.controls = 1
    return config
