"""The projection study: fine-tuning, probes, factors, neurons, and their report."""
