r"""Measure the accuracy of a model on visual domains, by domain and style of question.

    python -m experiments.evaluate --config=configs/embedded_evaluate.py --workdir=DIR \
        [--edits='ablate lm.mlp.act[12]'] [--captures='fire=stats lm.mlp.act by=kind']

The answer to a question is its option of the highest log-likelihood, or with
`--config.measure=answers` the option that the generated text names. The workdir receives
`results.json`, `accuracy.csv`, `figures/accuracy.png` and `manifest.json`. `--captures` are read
during the prompts, and with generated answers during these too, and written to
`captures/DOMAIN-STYLE.npz`.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.evaluate.study", takes=("edits", "captures"), rows={"batch_size": 1})
