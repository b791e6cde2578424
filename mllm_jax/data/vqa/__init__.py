"""The five VQA data sets of MMNeuron: TFDS builders, questions and prompts."""
