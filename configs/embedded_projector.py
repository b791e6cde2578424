"""The projector of the embedded model, trained on the five embedded domains; all else frozen.

    python -m experiments.train --config=configs/embedded_projector.py --workdir=DIR
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.projector = "random"
    config.domains = ()  # some of the embedded domains; all five by default
    config.paths = ()  # or own domains: folders, .csv or .jsonl files
    config.train_per_domain = 500
    config.test_per_domain = 60
    config.batch_size = 4  # pictures; each with `questions` questions in one row
    config.questions = 4
    config.steps = 480
    config.seed = 0
    config.recipe = ml_collections.ConfigDict()
    config.recipe.part = "projector"
    config.recipe.rate = 1e-3
    config.recipe.warmup = 0.03
    config.recipe.weight_decay = 0.0
    config.recipe.clip = 1.0
    config.recipe.remat = False
    config.recipe.every = 50
    return config
