"""Runs blocks and couplings on a schedule, as one Optax transformation."""
