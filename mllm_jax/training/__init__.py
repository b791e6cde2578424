"""Fine-tuning: the parts that train, the losses, the loop and its checkpoints."""
