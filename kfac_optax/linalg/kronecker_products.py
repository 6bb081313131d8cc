"""Solves with a damped Kronecker product `A (x) G` in matrix form: `V [p, q]`, `A [p, p]`,
`G [q, q]`.

Everything runs at the highest matmul precision: TF32 or bfloat16 passes would drown small
eigenvalues.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.factorize import Eigen, damped_quotient

_PI_RANGE = (1e-6, 1e6)


def sandwich(
    left: Array,
    middle: Array,
    right: Array,
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Array:
    """`left @ middle @ right`."""
    product = jnp.matmul(left, middle, precision=precision)
    return jnp.matmul(product, right, precision=precision)


def eigen_solve(
    a: Eigen,
    g: Eigen,
    v: Float[Array, "p q"],
    damping: Float[Array, ""],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "p q"]:
    """Exact damping, `(A (x) G + damping I)^{-1}`:
    `U_A [(U_A^T V U_G) / (s_A s_G^T + damping)] U_G^T`.

    Directions whose divisor is below rounding of the largest eigenvalue, `4 eps max(s_A s_G^T)`,
    get no update (the pseudo-inverse), so that a singular product has a finite answer without
    damping. Martens & Grosse (2015), section 6.3 discusses damping; the eigenbasis form is the
    exact solve.

    >>> from kfac_optax.linalg.factorize import psd_eigh
    >>> eye = psd_eigh(jnp.eye(2))
    >>> print(eigen_solve(eye, eye, jnp.ones((2, 2)), jnp.float32(1.0)))
    [[0.5 0.5]
     [0.5 0.5]]
    """
    # in the eigenbasis A (x) G is diagonal, with entries s_A s_G^T [p, q]
    rotated = sandwich(a.vectors.T, v, g.vectors, precision=precision)
    values = a.values[:, None] * g.values
    scaled = damped_quotient(rotated, values, damping)
    return sandwich(a.vectors, scaled, g.vectors.T, precision=precision)


def trace_ratio(a: Float[Array, "p p"], g: Float[Array, "q q"]) -> Float[Array, ""]:
    """`pi = sqrt((tr A / p) / (tr G / q))`, one where either trace vanishes.

    Martens & Grosse (2015), section 6.3.

    >>> print(trace_ratio(4 * jnp.eye(3), jnp.eye(2)))
    2.0
    """
    # mean eigenvalues, so that factors of different size compare
    mean_a = jnp.trace(a) / a.shape[0]
    mean_g = jnp.trace(g) / g.shape[0]
    return mean_ratio(mean_a, mean_g)


def mean_ratio(
    mean_a: Float[Array, ""],
    mean_g: Float[Array, ""],
) -> Float[Array, ""]:
    """`pi = sqrt(mean_a / mean_g)` from the mean eigenvalues of both factors, as `trace_ratio`.

    >>> print(mean_ratio(jnp.float32(4.0), jnp.float32(1.0)))
    2.0
    """
    # a factor of zeros, before the first statistic, has no scale to balance
    usable = (mean_a > 0) & (mean_g > 0)
    numerator = jnp.where(usable, mean_a, 1)
    divisor = jnp.where(usable, mean_g, 1)
    pi = jnp.sqrt(numerator / divisor)
    return jnp.clip(pi, *_PI_RANGE)
