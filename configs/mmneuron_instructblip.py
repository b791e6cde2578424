"""MMNeuron (Huo et al., EMNLP 2024) on its own data: InstructBLIP, five VQA data sets.

    python -m experiments.domain_neurons --config=configs/mmneuron_instructblip.py --workdir=DIR \
        --config.vqa.manual=FOLDER

FOLDER holds the data sets as they are downloaded; `vqa.instructions(NAME)` of mllm_jax.data.vqa
states what to download and where to put it. They are built once. `:official` follows the released
code, including its metrics, its sampling and its small number of counted pictures
(docs/official.md).

Expected results: ablating domain neurons changes no accuracy by more than 10 %, and less than 1 %
of the neurons are domain-specific (from the paper's abstract and text; its tables by module are not
public as numbers). The rates determine the number of selected neurons,
K = round(0.01 * layers * width):

    module    layers * width        K
    lm        32 * 11,008       3,523
    vision    39 *  6,144       2,396
    qformer   12 *  3,072         369   text branch; the last layer affects nothing
    query     12 *  3,072         369   query branch

Cost in floating-point operations, with T = 32 image tokens + about 60 of text, P = 6.7e9
parameters of the language model, 32 layers of width 4,096, V = 32,001 words:

    pass      2 P T + 4 * 32 * 4,096 T^2    = 1.2e12     the language model reads one picture
    tower     257 * 2 * 1.0e9               = 0.5e12     and 0.2e9 * 2 * 60 of the Q-Former
    lens      2 * 32 * 4,096 V T            = 0.8e12
    decode    2 P * 64                      = 0.9e12     an answer of full length

    count     5 * 10,001        * (pass + tower)               = 8.5e16
    ablate    5 *  1,001 * 41   * (2 pass + tower + decode)      = 7.8e17   41 = 1 + 5 * (5 + 3)
    lens      5 *    200        * (pass + tower + lens)        = 2.5e15

The total is 0.9e18: less than an hour on one accelerator that sustains 4e14 operations per second,
by the formula and not by measurement; decoding is limited by memory and takes longer than its
share. Memory: 16 GB of weights in bfloat16, 0.5 MB of cache per token; for counts 3 GB on the host
and 0.6 GB per domain on disk.
The memory that a TPU slice needs, from the compiler:

    python -m experiments.plan --model=instructblip-vicuna-7b --topology=v5e:2x4 --study=counts+lens
"""

import ml_collections

from configs import base


def get_config(procedure: str = "paper") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("mmneuron_instructblip.py", procedure, ("paper", "official"))
    config = base.mmneuron(procedure)
    config.model = "Salesforce/instructblip-vicuna-7b"
    config.vqa.model = "instructblip"  # the model whose prompts are used
    config.modules = (  # to ablate; join several by +
        "lm", "vision", "qformer+query", "vision+qformer+query", "all",
    )  # fmt: skip
    config.batch_size = 16
    return config
