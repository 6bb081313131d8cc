"""What all checks of blocks share: double precision, random matrices, and what is close."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import PyTree
from kfac_optax.testing.case import Case


def in_float64(check: Callable[..., None]) -> Callable[..., None]:
    """Runs a check in double precision, where bounds are tight."""

    @functools.wraps(check)
    def checked(*args: Any, **options: Any) -> None:
        with jax.enable_x64(True):
            check(*args, **options)

    return checked


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """A random array, the same for a seed."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal(shape))


def holds(case: Case, law: str, true: Any, number: str) -> None:
    """Raises where a law is not true, with the number that shows it."""
    if not true:
        raise AssertionError(f"block {case.block.name!r}: {law}: {number}.")


def close(
    case: Case,
    law: str,
    got: PyTree,
    expected: PyTree,
    rtol: float,
    atol: float,
) -> None:
    """Raises where two trees differ by more than `atol + rtol |expected|`."""
    # leaf by leaf, in float64 or as they are
    leaves = map(np.asarray, jax.tree.leaves(got))
    others = map(np.asarray, jax.tree.leaves(expected))
    for x, y in zip(leaves, others, strict=True):
        # NaN is close to nothing
        near = np.allclose(x, y, rtol=rtol, atol=atol)
        if not near:
            off = np.abs(x - y).max()
            largest = np.abs(y).max()
            text = f"off by {off:.3g} where the largest entry is {largest:.3g}"
            holds(case, law, near, text)
