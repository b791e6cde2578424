"""Train a sparse autoencoder on activations of the language model, and test it on new pictures.

    python -m experiments.dictionary --config=configs/embedded_dictionary.py --workdir=DIR

Activations of one layer are collected at the image tokens of training pictures, in an order that is
drawn from a seed, and a dictionary learns to write each as a sum of few directions. On held-out
pictures its reconstruction takes the place of the activations: how much worse is the answer, beside
zeros and the mean in that place? All is measured at image and at text tokens apart.

The workdir receives `results.json`, `tables/*.csv`, `figures/*`, `index.html`, `manifest.json`, the
collected activations, and the folder `dictionary`, which `mj.load_dictionary` reads. `--edits`
change the model under study.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.dictionary.study", takes=("edits",), rows={"batch_size": 1})
