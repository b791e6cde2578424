"""The domain-neuron study: counts, selection, ablation, logit lens, and their report."""
