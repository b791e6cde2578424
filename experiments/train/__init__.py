"""Training of the projector, and its loss curve."""
