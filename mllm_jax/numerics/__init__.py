"""Numerics: precision, indexing of bfloat16 arrays, rows in turn, matrix products on CPUs."""
