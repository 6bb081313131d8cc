"""From model and likelihood to statistics, rows and products of the curvature."""
