"""The report of the domain-neuron study: its sections, plots and page."""
