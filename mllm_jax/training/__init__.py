"""Fine-tuning: which parts train, what is minimised, and the loop."""
