"""Optax transformations."""
