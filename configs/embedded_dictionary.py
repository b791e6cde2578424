"""A sparse autoencoder of the embedded model's middle layer, trained at image tokens.

python -m experiments.dictionary --config=configs/embedded_dictionary.py --workdir=DIR
python -m experiments.dictionary --config=configs/embedded_dictionary.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_dictionary.py", size, ("full", "quick"))
    config = base.embedded()
    config.styles = ("choice", "category")  # one question for each picture, in turn
    config.site = "lm.resid_post"  # or lm.mlp.out, lm.attn_out
    config.layer = 15
    config.tokens = "image"  # kind of the tokens to train on; or text
    config.train_per_domain = 100
    config.test_per_domain = 20
    config.batch_size = 4  # pictures of a pass
    config.recipe = ml_collections.ConfigDict()
    config.recipe.kind = "batch_topk"  # or topk, jumprelu
    config.recipe.latents = 2304
    config.recipe.k = 32  # active latents of a token
    config.recipe.rate = 1e-3  # learning rate of Adam
    config.recipe.warmup = 0.05
    config.recipe.auxiliary = 1 / 32  # weight of the loss of dead latents
    config.recipe.dead_after = 20_000  # tokens
    config.recipe.sparsity = 1.0  # weight of the penalty of jumprelu
    config.recipe.every = 200  # steps between two checkpoints
    config.steps = 1500
    config.vectors = 512  # of a step
    config.shown = 20  # latents on the page
    config.seed = 0
    if size == "quick":
        config.train_per_domain = 4
        config.test_per_domain = 4
        config.recipe.latents = 256
        config.recipe.k = 16
        config.recipe.dead_after = 2_000
        config.steps = 50
        config.vectors = 128
        config.shown = 5
    return config
