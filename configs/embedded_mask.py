"""The neurons that the embedded model needs for its answers, by a learned mask.

python -m experiments.mask --config=configs/embedded_mask.py --workdir=DIR
python -m experiments.mask --config=configs/embedded_mask.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_mask.py", size, ("full", "quick"))
    config = base.embedded()
    config.styles = ("choice", "category")  # one question for each picture, in turn
    config.site = "lm.mlp.act"  # or lm.attn.heads, vision.mlp.act, projector.act, ...
    config.gate = "hard_concrete"  # or sigmoid
    config.penalty = 1.0  # cost in nats of all gates together when they are open
    config.start = 2.0  # initial logit of every gate
    config.rate = 0.1  # learning rate of Adam
    config.steps = 200
    config.train_per_domain = 24
    config.test_per_domain = 12
    config.controls = 2  # seeds of random masks with the same number of units in each layer
    config.batch_size = 8
    config.seed = 0
    if size == "quick":
        config.steps = 40
        config.train_per_domain = 4
        config.test_per_domain = 4
        config.controls = 1
        config.batch_size = 4
    return config
