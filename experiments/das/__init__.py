"""Distributed alignment search: training of subspaces, their test, and the report."""
