"""Uses of parameters that no front end has seen, found in the traced program."""
