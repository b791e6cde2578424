"""Sweep a grid of edits over the layers of the language model, to locate where answers form.

    python -m experiments.sweep --config=configs/embedded_sweep.py:tokens --workdir=DIR

Pictures are paired within a domain: the two have the same question and different answers. The
metric is the log-odds of the picture's own answer against that of its partner, at the first
answer token. The rows of the grid are layers, and its columns are one of

* tokens: the residual of some tokens is replaced by the partner's (causal tracing by interchange);
  if a model reads pictures at their native resolution, the partner is scaled to the size of the
  picture, and all pictures are divided into the number of rows of the one with the fewest;
* heads: one attention head is ablated;
* parts: attention or MLP is ablated;
* strengths: the MLP is scaled.

The workdir receives `results.json`, `grid.csv`, `figures/grid.png`, `index.html` and
`manifest.json`.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.sweep.study", eigen=True, rows={"batch_size": 2})
