"""Metrics of visual question answering: the standard ones, and those of MMNeuron's release."""
