"""Sums of powers along a sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_NEAR_ONE = 0.1  # where (1 - x) T is smaller, the closed form of eta cancels and its series is used


def eta(
    x: Float[Array, "*shape"],
    length: Float[Array, ""] | float,
) -> Float[Array, "*shape"]:
    """`sum_{|d|<T} (T - |d|) x^|d|` for `-1 < x <= 1`, linear in `T` between whole numbers.

    Closed form `(T (1 - x^2) - 2 x (1 - x^T)) / (1 - x)^2`, and its series in `1 - x` where that
    cancels; `T^2` at one.

    >>> print(eta(jnp.array([0.0, 0.5, 1.0]), 2.0), eta(jnp.array(0.5), 2.5))
    [2. 3. 4.] 4.25

    Reference: Martens, Ba & Johnson, Kronecker-factored Curvature Approximations for Recurrent
      Neural Networks (2018).
    """
    # mean lengths are no whole numbers
    lower = jnp.floor(length)
    part = length - lower
    shorter = _eta(x, lower)
    longer = _eta(x, lower + 1)
    return (1 - part) * shorter + part * longer


def _eta(x: Array, t: Array) -> Array:
    gap = 1 - x
    # the closed form is 0 / 0 at x = 1
    near = gap * t < _NEAR_ONE
    safe = jnp.where(near, 1, gap)
    # 1 - x^T, of negative x by its sign: logarithms know |x| only
    logarithm = t * jnp.log(jnp.abs(x))
    negative = (x < 0) & (t % 2 == 1)
    with_sign = 1 + jnp.exp(logarithm)
    without = -jnp.expm1(logarithm)
    one_minus_power = jnp.where(negative, with_sign, without)
    numerator = t * gap * (1 + x) - 2 * x * one_minus_power
    closed = numerator / (safe * safe)
    # (T - sum_{k<T} x^k) / gap = C(T,2) - C(T,3) gap + C(T,4) gap^2 - ...
    series = jnp.zeros_like(gap)
    term = t * (t - 1) / 2 * jnp.ones_like(gap)
    for k in range(2, 12):
        series = series + term
        term = -term * (t - k) / (k + 1) * gap
    return jnp.where(near, t + 2 * x * series, closed)
