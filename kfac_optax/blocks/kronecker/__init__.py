"""Blocks that are Kronecker products, or sums of two, and their corrections."""
