"""The studies: one folder each, with flags, steps and report; run them from the checkout."""
