"""The attribution study: gradients of gates, ablation of the top units, and the report."""
