"""Kronecker blocks whose factors are held as a few eigenpairs."""
