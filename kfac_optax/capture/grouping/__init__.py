"""Which sites are uses of one layer, and why a parameter belongs to none."""
