"""Checkpoints as tables: readers, the embedded model, loading and saving."""
