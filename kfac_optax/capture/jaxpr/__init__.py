"""Traced programs: their calls, what is known of their values, other equations in their place."""
