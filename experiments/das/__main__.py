"""Find the subspace that stores an answer, by distributed alignment search (Geiger et al. 2024).

    python -m experiments.das --config=configs/embedded_das.py --workdir=DIR

The model gets the same question for all pictures. At the last token of the prompt, within a
low-rank subspace of the residual stream, the state of a picture is replaced by that of another
picture with a different answer. The subspace is trained so that the model gives the
other picture's answer. Its interchange accuracy on test pictures is compared with random subspaces
of the same rank, and with the full residual stream.

The workdir receives `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`, `manifest.json`,
and `basis-LAYER.npy`, float32[D, r], which is a value of an edit:
`--edits='project_out lm.resid_post[12] @DIR/basis-12.npy'`. `--edits` change the model under study,
except its vision tower.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.das.study", takes=("edits",), rows={"batch_size": 2})
