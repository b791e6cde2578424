"""Lenses on the embedded model, layer by layer, compared with its own distribution.

python -m experiments.lens --config=configs/embedded_lens.py --workdir=DIR
python -m experiments.lens --config=configs/embedded_lens.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_lens.py", size, ("full", "quick"))
    config = base.embedded()
    config.styles = ("category",)  # of the questions, in turn
    config.layers = (0, 5, 10, 15, 20, 25, 29)  # ends with the model's last; empty for all
    config.text_styles = ("kind", "category")  # whose answers image tokens are compared with
    config.train_per_domain = 24  # pictures whose states train the tuned lens
    config.test_per_domain = 10
    config.jacobian_per_domain = 1  # training pictures, each with D backward passes
    config.jacobian_batch_size = 1
    config.steps = 100  # of the tuned lens
    config.tokens = 128  # of each step
    config.rate = 1e-3  # learning rate of Adam
    config.word_layers = (10, 20, 25)  # of the figures with words
    config.batch_size = 4
    config.seed = 0
    if size == "quick":
        config.layers = (15, 25, 29)
        config.train_per_domain = 4
        config.test_per_domain = 4
        config.jacobian_per_domain = 0  # 0 leaves the Jacobian lens out
        config.steps = 10
        config.tokens = 64
        config.word_layers = (25,)
    return config
