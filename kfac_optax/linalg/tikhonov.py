"""Tikhonov damping shared out between two Kronecker factors."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.factorize import at_least_rounding
from kfac_optax.linalg.kronecker_products import mean_ratio


def tikhonov_shifts(
    mean_a: Float[Array, ""],
    mean_g: Float[Array, ""],
    damping: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(pi sqrt(damping), sqrt(damping) / pi)` with `pi = sqrt(mean_a / mean_g)`, one where either
    vanishes.

    Neither is smaller than rounding of its factor's mean eigenvalue, so that singular factors have
    a finite inverse.

    For factors that are not held as square matrices; the means are those of the eigenvalues,
    `tr A / p` and `tr G / q`.

    >>> print(*tikhonov_shifts(jnp.float32(4.0), jnp.float32(1.0), jnp.float32(0.25)))
    1.0 0.25

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), section 6.3.
    """
    # A + pi sqrt(damping) I and G + sqrt(damping) / pi I
    pi = mean_ratio(mean_a, mean_g)
    root = jnp.sqrt(damping)
    shift_a = at_least_rounding(pi * root, mean_a)
    shift_g = at_least_rounding(root / pi, mean_g)
    return shift_a, shift_g


def factor_shifts(
    a: Float[Array, "p p"],
    g: Float[Array, "q q"],
    damping: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`tikhonov_shifts` of two factors.

    >>> print(*factor_shifts(4 * jnp.eye(3), jnp.eye(2), jnp.float32(0.25)))
    1.0 0.25
    """
    # a trace is the sum of the eigenvalues
    mean_a = jnp.trace(a) / len(a)
    mean_g = jnp.trace(g) / len(g)
    return tikhonov_shifts(mean_a, mean_g, damping)
