"""Passes through a model: run, generate, score, sweep and its clean pass, reduce, collect."""
