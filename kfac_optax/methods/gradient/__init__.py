"""Preconditioners that need gradients alone: a parameter tree is all they are told."""
