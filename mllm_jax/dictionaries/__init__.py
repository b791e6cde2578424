"""Dictionaries: sparse autoencoders and transcoders as pytrees, and the files that hold them."""
