"""A trained dictionary: activations, training, held-out pictures, and the report."""
