"""The rivals, each in a process of its own environment. Nothing here imports mllm_jax."""
