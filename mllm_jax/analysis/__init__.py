"""Pure functions of arrays, one idea per file, independent of models and files."""
