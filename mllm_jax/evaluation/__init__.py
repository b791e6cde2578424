"""Evaluation: classification by generated answers and by scores, CLIP zero-shot, metrics."""
