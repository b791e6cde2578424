"""The parts of the main study, `experiments.domain_neurons`: one file for each thing it does."""
