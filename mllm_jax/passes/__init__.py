"""What is done: run, generate, score, sweep and its clean pass, reduce, collect."""
