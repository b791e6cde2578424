"""Visual domains, classification tasks, VQA data sets, and sequences of batches."""
