"""Blocks of one batch, inverted in the space of its rows or examples."""
