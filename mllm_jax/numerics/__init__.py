"""Numerics: precision, indexing of bfloat16 arrays, batches row by row, matrix products on CPUs."""
