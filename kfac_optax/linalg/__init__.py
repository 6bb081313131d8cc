"""Matrices only: factorisations and Kronecker-product solves; knows nothing of layers."""
