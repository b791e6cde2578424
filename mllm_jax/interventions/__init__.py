"""Edits and captures as pytrees, and the passes that take them."""
