"""Train the projector of a model on visual domains, with everything else frozen.

    python -m experiments.train --config=configs/embedded_projector.py --workdir=DIR

The workdir receives `projector.safetensors`, `results.json`, `loss.csv`, `figures/loss.png` and
`manifest.json`.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.train.study", eigen=True, rows={"batch_size": 1})
