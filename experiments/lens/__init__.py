"""The lens study: what several lenses read in the states of each layer, and their report."""
