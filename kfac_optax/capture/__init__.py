"""Finds the layers of a model by tracing and measures them in the backward pass."""
