"""Train the projector of a model on visual domains, with everything else frozen.

`--config.recipe.part` also trains the language model, whole or by low-rank products, see
`mllm_jax.training.parts`.

    python -m experiments.train --config=configs/embedded_projector.py --workdir=DIR

The workdir receives `projector.safetensors`, or the whole model in `model` where more than the
projector is trained, `results.json`, `loss.csv`, `figures/loss.png` and `manifest.json`.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.train.study", eigen=True, rows={"batch_size": 1})
