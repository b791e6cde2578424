"""Figures, tables and the HTML page of a study, from its plain results."""
