"""Convert pictures and text to batches: code that the processors of all families share."""
