"""Training: parts of a model, learned edits, dictionaries and lenses; losses and checkpoints."""
