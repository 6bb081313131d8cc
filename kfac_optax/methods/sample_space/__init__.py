"""Exact natural-gradient steps through the kernel of the samples."""
