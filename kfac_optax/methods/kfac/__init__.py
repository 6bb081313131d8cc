"""K-FAC and its relatives."""
