"""One file per network. Networks know sites; they know no data, files or experiments."""
