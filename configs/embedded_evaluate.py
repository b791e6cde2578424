"""The accuracy of the embedded model on held-out pictures.

python -m experiments.evaluate --config=configs/embedded_evaluate.py --workdir=DIR
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Return the config of the study."""
    config = base.embedded()
    config.styles = ("choice", "category", "yesno", "kind")
    config.measure = "options"  # the most probable option; "answers" generates text
    config.new_tokens = 12  # maximum length of a generated answer
    config.test_per_domain = 60
    config.batch_size = 8
    return config
