"""Pure functions of arrays, one idea per file; they know no models and no files."""
