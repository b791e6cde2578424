"""Which neurons of the embedded model make its answers.

python -m experiments.attribution --config=configs/embedded_attribution.py --workdir=DIR
python -m experiments.attribution --config=configs/embedded_attribution.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    base.check_variant("embedded_attribution.py", size, ("full", "quick"))
    config = base.embedded()
    config.styles = ("choice", "category")  # one question a picture, in turn
    config.site = "lm.mlp.act"  # or lm.attn.heads, vision.mlp.act, projector.act, ...
    config.metric = "difference"  # of the right and a wrong option; or "answer"
    config.steps = 8  # of integrated gradients, more add up more nearly; 0 is first order
    config.train_per_domain = 24
    config.test_per_domain = 24
    config.top = 50  # units that are listed
    config.off = (10, 100, 1000)  # units that are switched off
    config.controls = 2  # seeds of random units, as many in every layer
    config.batch_size = 4
    if size == "quick":
        config.steps = 2
        config.train_per_domain = 4
        config.test_per_domain = 4
        config.off = (10, 100)
        config.controls = 1
    return config
