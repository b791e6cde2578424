"""MMNeuron's study (Huo et al., EMNLP 2024) on its own data with a newer model: Qwen2.5-VL 7B.

    python -m experiments.domain_neurons --config=configs/mmneuron_qwen2_5_vl.py --workdir=DIR \
        --config.vqa.manual=FOLDER

FOLDER holds the data sets as they are downloaded; `vqa.instructions(NAME)` of mllm_jax.data.vqa
states what to download and where to put it. They are built once. The paper does not have this
model: answers are generated within the model's own chat template, and neurons are counted on the
bare question, as in the paper. `:official` follows the released code otherwise (docs/official.md).

Expected results: no numbers are published for this model. The rates determine the number of
selected neurons, K = round(0.01 * layers * width):

    module     layers * width        K
    lm         28 * 18,944       5,304
    vision     32 *  3,420       1,094
    projector   1 *  5,120          51

A picture keeps its shape and is scaled to at most `max_pixels`, here 1,024 tokens of 28 x 28
pixels; the checkpoint allows 16,384, so that pages of docvqa are smaller here. Pictures are padded
to a power of 2 of patches, so that all data sets need four shapes: 512 to 4,096 patches.

Cost in floating-point operations, with at most 1,024 image tokens + about 60 of text (T), 4,096
patches, 6.5e9 parameters of the LM without its words, V = 152,064 words:

    pass      2 * 6.5e9 T + 4 * 28 * 3,584 T^2                     = 1.5e13
    tower     2 * 6.3e8 * 4,096 + 4 * 32 * 1,280 * 4,096^2         = 0.8e13
    lens      2 * 28 * 3,584 V T                                   = 3.3e13

    count     5 * 10,001        * (pass + tower)           = 1.2e18
    ablate    5 *  1,001 * 33   * (2 pass + tower)         = 6.3e18   33 = 1 + 4 * (5 + 3) cells
    lens      5 *    200        * (pass + tower + lens)    = 5.6e16

The total is 7.5e18: five hours on one accelerator that sustains 4e14 operations per second, by the
formula and not by measurement. Memory: 17 GB of weights in bfloat16, 57 KB of cache per token.
The memory that a TPU slice needs, from the compiler:

    python -m experiments.plan --model=qwen2.5-vl-7b --topology=v5e:2x4 --study=counts+lens
"""

import ml_collections

from configs import base


def get_config(procedure: str = "paper") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("mmneuron_qwen2_5_vl.py", procedure, ("paper", "official"))
    config = base.mmneuron(procedure)
    config.model = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.max_pixels = 1024 * 28 * 28  # larger pictures are scaled down
    config.vqa.model = "chat"  # generated answers are in the template of the checkpoint
    config.modules = ("lm", "vision", "projector", "all")  # to ablate; join several by +
    config.batch_size = 4
    return config
