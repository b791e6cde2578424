"""Paper A (MMNeuron, Huo et al., EMNLP 2024) on its own data: InstructBLIP, five VQA data sets.

    python -m experiments.domain_neurons --config=configs/mmneuron_instructblip.py --workdir=DIR \
        --config.vqa.manual=FOLDER

FOLDER holds the data sets as they are downloaded, `vqa.instructions(NAME)` of mllm_jax.data.vqa
says what and where; they are built once. `:official` does what the released code does, its
metrics, its sampling and its few counted pictures included (docs/official.md).

To expect: no accuracy changes by more than 10 % when domain neurons are off, and under 1 % of the
neurons are domain-specific (the paper's abstract and text; its tables by module are not public as
numbers). The rates fix how many are selected, K = round(0.01 * layers * width):

    module    layers * width        K
    lm        32 * 11,008       3,523
    vision    39 *  6,144       2,396
    qformer   12 *  3,072         369   its text; the last layer reaches nothing
    query     12 *  3,072         369   its queries

What it takes, in floating-point operations, with T = 32 image tokens + some 60 of text, P = 6.7e9
parameters of the LM, 32 layers of width 4,096, V = 32,001 words:

    pass      2 P T + 4 * 32 * 4,096 T^2    = 1.2e12     the LM reads one picture
    tower     257 * 2 * 1.0e9               = 0.5e12     and 0.2e9 * 2 * 60 of the Q-Former
    lens      2 * 32 * 4,096 V T            = 0.8e12
    say       2 P * 64                      = 0.9e12     an answer of full length

    count     5 * 10,001        * (pass + tower)               = 8.5e16
    ablate    5 *  1,001 * 41   * (2 pass + tower + say)       = 7.8e17   41 = 1 + 5 * (5 + 3)
    lens      5 *    200        * (pass + tower + lens)        = 2.5e15

in all 0.9e18: under an hour on one accelerator that keeps up 4e14 a second, after the formula and
not a clock; decoding, which waits for memory, takes longer than its share. Memory: 16 GB of weights
in bfloat16, 0.5 MB of cache a token; on the host 3 GB of counts, on disk 0.6 GB a domain.
What a slice of TPUs has to hold, by the compiler:

    python -m experiments.plan --model=instructblip-vicuna-7b --topology=v5e:2x4 --study=counts+lens
"""

import ml_collections

from configs import base


def get_config(procedure: str = "paper") -> ml_collections.ConfigDict:
    base.check_variant("mmneuron_instructblip.py", procedure, ("paper", "official"))
    config = base.mmneuron(procedure)
    config.model = "Salesforce/instructblip-vicuna-7b"
    config.vqa.model = "instructblip"  # whose prompts
    config.modules = (  # cut; several are joined by +
        "lm", "vision", "qformer+query", "vision+qformer+query", "all",
    )  # fmt: skip
    config.batch_size = 16
    return config
