"""Ready-made methods."""
