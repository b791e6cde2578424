"""Visual domains, the processor, and sequences of batches."""
