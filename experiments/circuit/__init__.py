"""The study of circuits of heads and MLPs on minimal pairs."""
