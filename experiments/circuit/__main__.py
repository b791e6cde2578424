"""Find the circuit of heads and MLPs that carries an answer, and test it on held-out pairs.

    python -m experiments.circuit --config=configs/embedded_circuit.py --workdir=DIR

The inputs of a minimal pair have one layout and different answers: the same question about two
pictures (`config.swap="picture"`), or two questions of equally many tokens about one picture
(`"question"`). The metric is the difference of the log-probabilities of the two answers at the
first token in which they differ; their common beginning is appended to the prompt.

On training pairs, attribution patching with integrated gradients scores each head and MLP by kind
of token, and EAP-IG each edge between them; for some nodes the estimate is compared with an exact
patch. On held-out pairs, faithfulness, completeness and minimality are measured for the circuits of
highest score and for random circuits of equal size. Evaluated circuits consist of nodes; edges are
listed and drawn by their score.

The workdir receives `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`, `manifest.json`,
and `circuit.npz` with the scores of all nodes and edges. `--edits` change the model under study.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.circuit.study", takes=("edits",), rows={"batch_size": 2})
