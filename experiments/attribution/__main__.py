"""Attribute the answer to the units of a site, in one backward pass.

    python -m experiments.attribution --config=configs/embedded_attribution.py --workdir=DIR

Every unit of a site gets a gate of value 1. The metric is the log-likelihood of the right answer,
or its difference from that of a wrong option. Integrated gradients, or the first-order
approximation, attribute the metric to the gates over the training pictures of each domain. To
validate the attribution, the top units are then ablated on test pictures, and compared with equally
many random units of the same layers.

The workdir receives `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`, `manifest.json`,
and `attribution.npz` with the full arrays by domain. `--edits` change the model under study.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.attribution.study", takes=("edits",), rows={"batch_size": 1})
