"""One absl binary per study: flags, a config, calls into the library, files out."""
