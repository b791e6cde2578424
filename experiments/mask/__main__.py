"""Train a sparse mask of the units that are needed for the answer.

    python -m experiments.mask --config=configs/embedded_mask.py --workdir=DIR

Every unit of a site gets a gate (hard concrete, or sigmoid). The gates are trained to keep the
distribution of the next word (KL divergence), with a penalty on each open gate. On test pictures
the trained mask is compared with random masks of the same size in every layer.

The workdir receives `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`, `manifest.json`,
and `off.npy`, bool[L, F], which is an address: `--edits='ablate lm.mlp.act[@DIR/off.npy]'`.
`--edits` change the model under study.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.mask.study", takes=("edits",), rows={"batch_size": 1})
