"""The circuit by which the embedded model distinguishes pictures.

python -m experiments.circuit --config=configs/embedded_circuit.py --workdir=DIR
python -m experiments.circuit --config=configs/embedded_circuit.py:question --workdir=DIR
python -m experiments.circuit --config=configs/embedded_circuit.py:quick --workdir=DIR
"""

import ml_collections

from configs import base


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    """Return the config of the study."""
    base.check_variant("embedded_circuit.py", size, ("full", "question", "quick"))
    config = base.embedded()
    config.swap = "picture"  # what differs within a pair; or "question"
    config.partner = "domain"  # the other picture is of another domain; or class, of the same one
    config.styles = ("kind",)  # of the questions; your own pictures have "category"
    config.keep = "answered"  # pairs with both answers preferred; or apart: clean above corrupt
    config.kinds = ("image", "text")  # token kinds at which a head or MLP is a separate node
    config.steps = 5  # of integrated gradients; 0 for the gradient at the clean activations
    config.train_per_domain = 5  # pictures; about half as many pairs
    config.test_per_domain = 5
    config.sizes = (10, 30, 100, 200)  # numbers of nodes
    config.circuit = 10  # the number of nodes of the circuit that is shown
    config.draws = 2  # random circuits of each size
    config.exact_nodes = 12  # nodes with exact patches: half of the highest scores, half at random
    config.exact_pairs = 8  # rounded up to whole batches
    config.edges = 40  # number of edges to list and to draw
    config.batch_size = 4  # pairs
    config.seed = 0
    if size == "question":
        config.swap = "question"
        config.styles = ("kind", "category")
    if size == "quick":
        config.steps = 2
        config.train_per_domain = 2
        config.test_per_domain = 2
        config.sizes = (15, 100)
        config.circuit = 5
        config.draws = 1
        config.exact_nodes = 6
        config.exact_pairs = 2
        config.batch_size = 2
    return config
