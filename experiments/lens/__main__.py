"""Compare several lenses at every layer.

    python -m experiments.lens --config=configs/embedded_lens.py --workdir=DIR

A tuned lens and a Jacobian lens are fitted on training pictures, at image and question tokens. On
test pictures, their distributions and those of the logit lens are compared with the model's own:
the KL from the final distribution, the entropy, and the agreement of the most probable word with
the final one, by layer and kind of token, with intervals over pictures.

The workdir receives `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`, `manifest.json`,
and `lens-NAME.npz` with the maps x + x W + b of each fitted lens, `weight` float32[L - 1, D, D] and
`bias` float32[L - 1, D]. `--edits` change the model under study.
"""

from experiments.running import command

if __name__ == "__main__":
    rows = {"batch_size": 1, "jacobian_batch_size": 1}
    command.main("experiments.lens.study", takes=("edits",), rows=rows)
