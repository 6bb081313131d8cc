"""Blocks from mean inputs and mean output gradients."""
