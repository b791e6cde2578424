"""The studies, one folder each, with flags, steps and report. Run them from the checkout."""
