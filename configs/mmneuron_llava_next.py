"""MMNeuron (Huo et al., EMNLP 2024) on its own data: LLaVA-NeXT, five VQA data sets.

    python -m experiments.domain_neurons --config=configs/mmneuron_llava_next.py --workdir=DIR \
        --config.vqa.manual=FOLDER

FOLDER holds the data sets as they are downloaded; `vqa.instructions(NAME)` of mllm_jax.data.vqa
states what to download and where to put it. They are built once. `:official` follows the released
code, including its metrics, its sampling and its small number of counted pictures
(docs/official.md).

Expected results: ablating domain neurons changes no accuracy by more than 10 %, and less than 1 %
of the neurons are domain-specific (from the paper's abstract and text; its tables by module are not
public as numbers). The rates determine the number of selected neurons,
K = round(0.01 * layers * width):

    module     layers * width        K
    lm         32 * 11,008       3,523
    vision     23 *  4,096         942   (the release: 24 layers, 983; the last affects nothing)
    projector   1 *  4,096          41

Cost in floating-point operations, with at most T = 2,928 image tokens + about 60 of text,
P = 6.7e9 parameters of the LM, 32 layers of width 4,096, V = 32,064 words:

    pass      2 P T + 4 * 32 * 4,096 T^2     = 4.0e13 + 0.5e13     the LM reads one picture
    tower     5 tiles * 577 * 2 * 3.0e8      = 0.2e13
    lens      2 * 32 * 4,096 V T             = 2.5e13

    count     5 * 10,001        * (pass + tower)           = 2.4e18
    ablate    5 *  1,001 * 33   * (2 pass + tower)         = 1.5e19   33 = 1 + 4 * (5 + 3) cells
    lens      5 *    200        * (pass + tower + lens)    = 7.2e16

The total is 1.8e19: half a day on one accelerator that sustains 4e14 operations per second, by the
formula and not by measurement. The cost is proportional to the number of `modules` and `controls`.
Memory: 14 GB of weights in bfloat16, 0.5 MB of cache per token (6 GB for a batch of 4); for counts
3 GB on the host and 0.6 GB per domain on disk.
The memory that a TPU slice needs, from the compiler:

    python -m experiments.plan --model=llava-next-vicuna-7b --topology=v5e:2x4 --study=counts+lens
"""

import ml_collections

from configs import base


def get_config(procedure: str = "paper") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("mmneuron_llava_next.py", procedure, ("paper", "official"))
    config = base.mmneuron(procedure)
    config.model = "llava-hf/llava-v1.6-vicuna-7b-hf"
    config.vqa.model = "llava_next"  # the model whose prompts are used
    config.modules = ("lm", "vision", "projector", "all")  # to ablate; join several by +
    config.batch_size = 4
    return config
