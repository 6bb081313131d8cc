"""Quotients without a division by zero."""

import jax
import jax.numpy as jnp


def positive_or_one(x: jax.Array) -> jax.Array:
    """`x` where it is positive, one everywhere else: nothing is divided by zero there, not even in
    a branch that is not chosen.

    >>> print(positive_or_one(jnp.array([2.0, 0.0, jnp.nan])))
    [2. 1. 1.]
    """
    positive = x > 0
    return jnp.where(positive, x, 1)


def quotient_or_zero(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """`x / divisor` where the divisor is positive, zero everywhere else.

    >>> print(quotient_or_zero(jnp.array([6.0, 6.0]), jnp.array([2.0, 0.0])))
    [3. 0.]
    """
    # NaN is not positive either
    quotient = x / positive_or_one(divisor)
    return jnp.where(divisor > 0, quotient, 0)
