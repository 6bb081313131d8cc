"""Gaussian posteriors over the parameters, from the curvature of a trained model."""
