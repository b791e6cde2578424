"""Description of a model by its shapes: sites, parameters, bytes and neurons."""
