"""Blocks of single parameters, of channels and of output units."""
