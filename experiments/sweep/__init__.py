"""The sweep over layers: pairs of pictures, a grid of edits, and its report."""
