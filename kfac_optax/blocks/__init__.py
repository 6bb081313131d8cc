"""Per-layer curvature approximations, one file each."""
