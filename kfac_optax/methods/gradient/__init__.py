"""Methods that trace no layers: a parameter tree and gradients, for some an extra argument."""
