"""The report of the projection study: its sections, plots and page."""
