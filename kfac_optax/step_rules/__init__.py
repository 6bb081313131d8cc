"""Step control: transformations usable over any preconditioner."""
