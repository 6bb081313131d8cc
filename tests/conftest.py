"""Fixtures shared by all tests."""

import os

import jax
import pytest

# Compiling is most of the time of these tests, and code generation most of that. XLA's own passes run as ever; the flag is
# read when the first computation starts, and processes started by tests inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"


@pytest.fixture
def x64():
    """Double precision, for bounds that single precision would blur."""
    with jax.enable_x64(True):
        yield
