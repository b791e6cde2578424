"""Load and save models: checkpoints, adapters, the embedded model."""
