"""The lens study: several lenses at every layer, and their report."""
