"""Pictures and text to batches: what the processors of all families share."""
