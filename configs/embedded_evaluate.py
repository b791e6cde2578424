"""Held-out accuracy of the embedded model.

python -m experiments.evaluate --config=configs/embedded_evaluate.py --workdir=DIR
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.domains = ()  # some of the embedded domains; all five by default
    config.paths = ()  # or own domains: folders, .csv or .jsonl files
    config.styles = ("choice", "category", "yesno", "kind")
    config.test_per_domain = 60
    config.batch_size = 8
    return config
