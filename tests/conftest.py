"""Fixtures shared by all tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision, for bounds that single precision would blur."""
    with jax.enable_x64(True):
        yield
