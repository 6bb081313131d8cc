"""Fixtures shared by all tests."""

import os

import jax
import pytest

# Compiling is most of the time of these tests, and code generation most of that: code is not
# optimised, loops are emitted without MLIR, and a module is not split for threads. XLA's own passes
# run as ever; the flags are read when the first computation starts, and processes started by tests
# inherit them.
FAST_COMPILE = ("--xla_backend_optimization_level=0",)
if jax.__version_info__[:2] == (0, 10):  # XLA ends the process over flags that it does not know
    FAST_COMPILE += (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FAST_COMPILE))


@pytest.fixture
def x64():
    """Double precision, for bounds that single precision would blur."""
    with jax.enable_x64(True):
        yield
