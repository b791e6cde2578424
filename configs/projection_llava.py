"""Cross-Modal Projection (Verma et al., ACL 2024) as published: LLaVA-1.5-7B, four data sets.

    python -c 'from mllm_jax.data import classification as c; c.build("plantdoc", "/data/tasks")'
    python -m experiments.projection --config=configs/projection_llava.py:plantdoc --workdir=DIR
    python -m experiments.projection --config=configs/projection_llava.py:plantdoc-official ...

The data sets are plantdoc, dtd, dermnet and crisismmd. This config has not been run; the paper used
2 A100-80GB and an hour for each fine-tuning. Vision features are stored as float32, 2.4 MB per
picture (5 GB for plantdoc, 46 GB for dermnet). The paper's results (macro-F1 / accuracy; probes
macro-F1):

    |                          | plantdoc      | dtd           | dermnet       | crisismmd     |
    |--------------------------|---------------|---------------|---------------|---------------|
    | uniform random           | 0.031 / 0.034 | 0.021 / 0.022 | 0.045 / 0.048 | 0.243 / 0.266 |
    | CLIP zero-shot           | 0.417 / 0.449 | 0.458 / 0.498 | 0.178 / 0.240 | 0.414 / 0.472 |
    | Original                 | 0.106 / 0.126 | 0.188 / 0.214 | 0.066 / 0.067 | 0.517 / 0.568 |
    | FT-Proj                  | 0.222 / 0.248 | 0.451 / 0.465 | 0.293 / 0.340 | 0.623 / 0.715 |
    | FT-E2E                   | 0.598 / 0.653 | 0.745 / 0.750 | 0.495 / 0.546 | 0.795 / 0.855 |
    | probe before projection  | 0.699 / 0.712 | 0.764 / 0.764 | 0.605 / 0.649 | 0.751 / 0.824 |
    | probe after, Original    | 0.570         | 0.640         | 0.311         | 0.750         |
    | probe after, FT-Proj     | 0.413         | 0.474         | 0.218         | 0.603         |
    | probe after, FT-E2E      | 0.535         | 0.621         | 0.253         | 0.724         |

`official` follows the released code: FT-Proj reads the picture alone and does not learn the end of
turn, its pictures are cropped, and its learning rate is that of a randomly initialised projector;
labels lose their underscores; probes have the code's learning rate, batch size and epochs, without
early stopping. It does not select probes on the test pictures, sample the answers at temperature
0.2, or shuffle without a seed. The default corrects all of these settings. In both variants a tenth
of the training set is held out of data sets without a split for it, so they have a tenth fewer
training steps.
"""

import ml_collections

from configs import base

# Training pictures. The paper does not state crisismmd's; this is its total by the usual division.
TRAIN = {"plantdoc": 2108, "dtd": 1880, "dermnet": 14_000, "crisismmd": 7_873}
ALL = 1_000_000


def get_config(which: str = "plantdoc") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    name, _, choices = which.partition("-")
    if name not in TRAIN or choices not in ("", "official", "corrected"):
        raise ValueError(
            f"configs/projection_llava.py:{which} is not one of {', '.join(TRAIN)}, with or "
            "without -official after the name"
        )
    official = choices == "official"
    config = base.projection()
    config.model = "liuhaotian/llava-v1.5-7b"
    config.clip = "openai/clip-vit-large-patch14-336"  # for zero-shot; "" skips it
    config.tasks = (name,)
    config.choices = "official" if official else "corrected"
    config.seeds = (0, 1, 2, 3, 4)
    config.train_per_task = ALL
    config.held_per_task = ALL
    config.test_per_task = ALL
    config.wording = "released" if official else "paper"
    config.answers = "free"
    config.rows = 16
    config.checkpoints = True
    config.proj = _setting("projector", name, batch=64, rate=1e-3 if official else 2e-5)
    config.e2e = _setting("projector+lm", name, batch=32, rate=2e-5)
    config.proj.wording = config.e2e.wording = config.wording
    if official:
        config.proj.update({"wording": "plain", "end": False, "aspect": "square"})
    config.probe = ml_collections.ConfigDict()
    config.probe.rate = 1e-3 if official else 1e-4
    config.probe.batch = 32 if official else 128
    config.probe.epochs = 100 if official else 200
    config.probe.patience = 100 if official else 10
    config.depth = ("Original", "FT-Proj", "FT-E2E")
    config.factors.tasks = () if official else (name,)
    return config


def _setting(part: str, name: str, batch: int, rate: float) -> ml_collections.ConfigDict:
    """Return LLaVA-1.5's recipe for one epoch on 2 GPUs, with AdamW as in HF's trainer."""
    setting = base.fine_tuning(part, rate)
    setting.batch_size = batch
    setting.steps = -(-TRAIN[name] // batch)  # one epoch
    setting.recipe.lora = ml_collections.ConfigDict({"rank": 128, "alpha": 256.0})
    setting.recipe.remat = True
    return setting
