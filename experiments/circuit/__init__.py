"""Circuits of heads and MLPs on minimal pairs: found, evaluated and shown."""
