"""Subspaces in which the embedded model stores the kind of a picture, by alignment search.

python -m experiments.das --config=configs/embedded_das.py --workdir=DIR
python -m experiments.das --config=configs/embedded_das.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_das.py", size, ("full", "quick"))
    config = base.embedded()
    config.style = "kind"  # of the question; your own pictures have "category"
    config.layers = (5, 10, 15, 20, 25)  # one subspace for each layer
    config.rank = 4
    config.rate = 0.01  # learning rate of Adam
    config.steps = 100
    config.train_per_domain = 40
    config.test_per_domain = 20
    config.test_pairs = 80
    config.controls = 2  # seeds of random subspaces
    config.batch_size = 4  # pairs
    config.seed = 0
    if size == "quick":
        config.layers = (15,)
        config.steps = 10
        config.train_per_domain = 4
        config.test_per_domain = 4
        config.test_pairs = 8
        config.controls = 1
    return config
