"""Train a sparse autoencoder on activations of the language model, and test it on new pictures.

    python -m experiments.dictionary --config=configs/embedded_dictionary.py --workdir=DIR

Activations of one layer are collected at the image tokens of training pictures, in a seeded random
order, and a dictionary is trained to write each as a sum of few directions. On held-out pictures
the activations are replaced by their reconstruction, and the loss of the answer is compared with
that for zeros and for the mean. Image and text tokens are measured separately.

The workdir receives `results.json`, `tables/*.csv`, `figures/*`, `index.html`, `manifest.json`, the
collected activations, and the folder `dictionary`, which `mj.load_dictionary` reads. `--edits`
change the model under study.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main("experiments.dictionary.study", takes=("edits",), rows={"batch_size": 1})
