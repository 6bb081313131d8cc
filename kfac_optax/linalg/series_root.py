"""Inverse roots that follow an average by a series: products of matrices alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Numeric
from kfac_optax.linalg.factorize import symmetrize


def root_step(
    root: Float[Array, "n n"],
    news: Float[Array, "n n"],
    p: int,
    least: Numeric,
) -> Float[Array, "n n"]:
    """`R ~ H^(-1/p)` moved along with `H <- b H + (1 - b) S`.

    With `X = R^p S`, `b = max(least, ||X|| / (1 + ||X||))`, `Y = X (1 - b) / b` and `q = 2p`:
    `R <- b^(-1/p) T^T R T`, `T = I - Y/q + (q + 1) Y^2 / 2q^2`.

    Args:
      root: symmetric positive definite; the result is, too.
      news: `S`, symmetric PSD; where it is zero the root stays.
      p: a positive integer.
      least: of the weight `b`, at most 1; `||Y|| <= 1` whatever it is.

    >>> print(root_step(jnp.eye(1), jnp.eye(1), 4, 0.9).round(3))  # H stays one
    [[1.]]

    Reference: Singh, Bhatele et al., Jorge: Approximate Preconditioning for GPU-efficient
      Second-order Optimization (2023), which multiplies by the series of `(I + Y)^(-1/p)` from one
      side.
    """
    with jax.default_matmul_precision("highest"):
        x = jnp.linalg.matrix_power(root, p) @ news
        scale, growth, known = _weights(jnp.linalg.norm(x), p, least)
        y = scale * x
        # T = I - Y / 2p + (2p + 1) Y^2 / 8p^2
        linear, quadratic = _coefficients(p)
        identity = jnp.eye(root.shape[0], dtype=root.dtype)
        t = identity - y / linear
        t = t + quadratic * (y @ y)
        # from both sides, so that it stays positive definite
        both_sides = t.T @ root @ t
        moved = symmetrize(growth * both_sides)
    return jnp.where(known, moved, root)


def diagonal_step(
    root: Float[Array, " n"],
    news: Float[Array, " n"],
    p: int,
    least: Numeric,
) -> Float[Array, " n"]:
    """`root_step` of diagonal matrices.

    >>> print(diagonal_step(jnp.ones(1), jnp.ones(1), 4, 0.9).round(3))
    [1.]
    """
    x = root**p * news
    scale, growth, known = _weights(jnp.linalg.norm(x), p, least)
    y = scale * x
    linear, quadratic = _coefficients(p)
    t = 1 - y / linear + quadratic * y**2
    moved = growth * root * t**2
    return jnp.where(known, moved, root)


def _coefficients(p: int) -> tuple[int, float]:
    """`2p`, by which `Y` is divided in `T`, and `(2p + 1) / 8p^2`, the factor of `Y^2`."""
    return 2 * p, (2 * p + 1) / (8 * p * p)


def _weights(
    size: Array,
    p: int,
    least: Numeric,
) -> tuple[Array, Array, Array]:
    """`(1 - b) / b`, `b^(-1/p)`, and whether there is anything new."""
    known = size > 0
    usable = jnp.where(known, size, 1)  # where nothing is new the root stays anyway
    # (1 - b) / b = min((1 - least) / least, 1 / ||X||): of a large ||X|| the weight b rounds to one
    least = jnp.asarray(least, size.dtype)
    largest = (1 - least) / least
    odds = jnp.minimum(1 / usable, largest)
    # b = 1 / (1 + odds)
    growth = jnp.exp(jnp.log1p(odds) / p)
    return odds, growth, known
