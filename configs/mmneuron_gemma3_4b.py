"""MMNeuron's study (Huo et al., EMNLP 2024) on its own data with a newer model: Gemma 3 4B.

    python -m experiments.domain_neurons --config=configs/mmneuron_gemma3_4b.py --workdir=DIR \
        --config.vqa.manual=FOLDER

FOLDER holds the data sets as they are downloaded; `vqa.instructions(NAME)` of mllm_jax.data.vqa
states what to download and where to put it. They are built once. The paper does not have this
model: answers are generated within the model's own chat template, and neurons are counted on the
bare question, as in the paper. `:official` follows the released code otherwise (docs/official.md).

Expected results: no numbers are published for this model. Its projector has one linear map and so
no neurons. The rates determine the number of selected neurons, K = round(0.01 * layers * width):

    module    layers * width        K
    lm        34 * 10,240       3,482
    vision    27 *  4,304       1,162

Each picture is one square of 896 pixels, which becomes 256 tokens. Cost in floating-point
operations, with 256 image tokens + about 60 of text (T), 4,096 patches, 3.2e9 parameters of the LM
without its words, V = 262,208 words:

    pass      2 * 3.2e9 T + 4 * 34 * 2,048 T^2                     = 2.1e12
    tower     2 * 4.1e8 * 4,096 + 4 * 27 * 1,152 * 4,096^2         = 5.5e12
    lens      2 * 34 * 2,560 V T                                   = 1.4e13

    count     5 * 10,001        * (pass + tower)           = 3.8e17
    ablate    5 *  1,001 * 25   * (2 pass + tower)         = 1.2e18   25 = 1 + 3 * (5 + 3) cells
    lens      5 *    200        * (pass + tower + lens)    = 2.2e16

The total is 1.6e18: little more than an hour on one accelerator that sustains 4e14 operations per
second, by the formula and not by measurement; decoding is limited by memory and takes longer than
its share. Memory: 9 GB of weights in bfloat16, 139 KB of cache per token; for counts 3 GB on the
host. The memory that a TPU slice needs, from the compiler:

    python -m experiments.plan --model=gemma-3-4b --topology=v5e:2x4 --study=counts+lens
"""

import ml_collections

from configs import base


def get_config(procedure: str = "paper") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("mmneuron_gemma3_4b.py", procedure, ("paper", "official"))
    config = base.mmneuron(procedure)
    config.model = "google/gemma-3-4b-it"
    config.vqa.model = "chat"  # generated answers are in the template of the checkpoint
    config.modules = ("lm", "vision", "all")  # to ablate; join several by +
    config.batch_size = 8
    return config
