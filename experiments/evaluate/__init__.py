"""Accuracy by domain and style of question."""
