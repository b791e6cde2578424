"""How a study runs: its command line, its lock, its signals, and what its processes share."""
