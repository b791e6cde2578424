"""Times of mllm_jax against its rivals, in pairs: `python -m benchmarks.<name>`, one table each."""
