"""Training of the embedded model on the five embedded domains, its projector first.

    python -m experiments.train --config=configs/embedded_projector.py --workdir=ONE
    python -m experiments.train --config=configs/embedded_projector.py:second --workdir=TWO \
        --config.projector=ONE/projector.safetensors
    python -m experiments.train --config=configs/embedded_projector.py:third --workdir=THREE

The first stage trains the projector alone, on all question styles; the second continues with the
styles that need details of the picture. They gave the projector that ships, from which the third
trains the projector and low-rank products of the language model; THREE/model is the model.
"""

import ml_collections

from configs import base


def get_config(stage: str = "first") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_projector.py", stage, ("first", "second", "third"))
    config = ml_collections.ConfigDict()
    config.model = "embedded"
    config.projector = "random"
    config.domains = ()  # a subset of the embedded domains; empty for all five
    config.paths = ()  # or your own domains: folders, .csv or .jsonl files
    config.train_per_domain = 500
    config.test_per_domain = 60
    config.batch_size = 4  # pictures, each with `questions` questions packed into one row
    config.questions = 4
    config.styles = ()  # empty for all
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
    if stage == "second":
        config.questions = 2
        config.styles = ("category", "choice")
        config.steps = 300
    if stage == "third":
        config.projector = ""  # the one that ships
        config.questions = 2
        config.styles = ("category", "choice")
        config.steps = 300
        config.recipe.part = "projector+lora"
        config.recipe.rate = 5e-4
        config.recipe.projector_rate = 2e-4
    return config
