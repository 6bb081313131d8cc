"""Experiments that compare K-FAC and two-level K-FAC with first-order optimizers."""
