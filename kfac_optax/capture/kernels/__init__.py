"""Kernels that a program makes of its parameters, taken apart."""
