"""Inverse p-th roots of symmetric positive semi-definite matrices, for every integer p."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Numeric
from kfac_optax._validate import check_choice, check_number
from kfac_optax.linalg.factorize import at_least_rounding, psd_eigh, symmetrize
from kfac_optax.linalg.powers import exponent_near, times_power

METHODS = ("eigh", "newton")
_ITERATIONS = 100
_FAILED = 0.1  # a residual above this is no root
_GROWTH = 1.2  # rounding has taken over where the residual grows by more
_SQUARINGS = 6


def inverse_root(
    matrix: Float[Array, "n n"],
    p: int,
    *,
    ridge: Numeric = 1e-6,
    method: str = "eigh",
) -> Float[Array, "n n"]:
    """`(M + ridge lambda_max I)^(-1/p)` of a symmetric PSD matrix.

    A matrix of zeros has the root zero. What is singular to working precision although the ridge
    was added has no part in the result (pseudo-inverse, `"eigh"` alone).

    Args:
      matrix: one matrix, `[n, n]`; batches by `jax.vmap`. Narrower than float32 is widened to that.
      p: a positive integer.
      ridge: relative to the largest eigenvalue, not negative. Newton's iteration takes it relative
        to an upper bound of that, at most a factor `n^(1/128)` off, and no less than rounding.
      method: `"eigh"`, one eigendecomposition; or `"newton"`, the coupled iteration, products of
        matrices alone, for condition numbers up to about a millionth of the inverse rounding.

    Returns:
      The root, symmetric, in float32 or wider. NaN where the matrix has an entry that is not finite
      or where Newton's iteration did not converge.

    Raises:
      ValueError: `p` is no positive integer, `ridge` is negative or `method` is unknown.

    >>> print(inverse_root(jnp.diag(jnp.array([16.0, 81.0])), 4, ridge=0.0).round(4))
    [[0.5    0.    ]
     [0.     0.3333]]

    References: Guo & Higham, A Schur-Newton Method for the Matrix p-th Root and its Inverse (2006);
      Anil, Gupta, Koren, Regan & Singer, Scalable Second Order Optimization for Deep Learning
      (2020), for the iteration.
    """
    check_choice("inverse_root", "method", method, METHODS)
    check_number("inverse_root", "ridge", ridge, at_least=0)
    if not isinstance(p, int) or p < 1:
        raise ValueError(f"inverse_root: p={p!r}; expected a positive integer.")
    # half precision has no eigendecomposition
    wide = jnp.promote_types(matrix.dtype, jnp.float32)
    matrix = symmetrize(jnp.asarray(matrix, wide))
    # entries near one: (2^e M)^(-1/p) = 2^(-e/p) M^(-1/p), with no over- or underflow in the powers
    exponent = _exponent(matrix)
    scaled = times_power(matrix, -exponent)
    solve = _by_eigh if method == "eigh" else _by_newton
    root = solve(scaled, p, ridge)
    scale = jnp.exp2(-exponent.astype(matrix.dtype) / p)
    return symmetrize(root) * scale


def inverse_root_of_values(
    values: Float[Array, " n"],
    p: int,
    *,
    ridge: Numeric = 1e-6,
) -> Float[Array, " n"]:
    """`(d + ridge max(d))^(-1/p)` of a diagonal matrix, zero where that is no positive number.

    >>> print(inverse_root_of_values(jnp.array([16.0, 0.0]), 4, ridge=0.0))
    [0.5 0. ]
    """
    values = jnp.maximum(values, 0)
    largest = jnp.max(values, initial=0)
    shift = jnp.asarray(ridge, values.dtype) * largest
    total = values + shift
    return _power(total, total > 0, p)


def _exponent(matrix: Array) -> Array:
    """Power of two near the largest entry; zero where there is none or it is not finite."""
    largest = jnp.max(jnp.abs(matrix), initial=0)
    usable = jnp.isfinite(largest) & (largest > 0)
    # of one half it is zero
    size = jnp.where(usable, largest, 0.5)
    return exponent_near(size)


def _power(total: Array, known: Array, p: int) -> Array:
    # a divisor that is safe where it is not used; NaN stays NaN
    base = jnp.where(known, total, 1)
    power = base ** (-1 / p)
    unknown = jnp.where(total > 0, 0, total)
    return jnp.where(known, power, unknown)


def _by_eigh(matrix: Array, p: int, ridge: Numeric) -> Array:
    vectors, values = psd_eigh(matrix)
    largest = values[-1]
    shift = jnp.asarray(ridge, values.dtype) * largest
    total = values + shift
    # U diag((d + ridge d_max)^(-1/p)) U^T; a singular direction has no part in it
    rounding = at_least_rounding(jnp.zeros_like(largest), largest)
    known = (total >= rounding) & (total > 0)
    scaled = vectors * _power(total, known, p)
    return jnp.matmul(scaled, vectors.T, precision="highest")


def _largest(matrix: Array) -> Array:
    """`||M^(2^m)||^(1/2^m)`, Frobenius norm: an upper bound of the largest eigenvalue."""
    bound = jnp.ones((), matrix.dtype)
    weight = 1.0
    # M <- (M / ||M||)^2; the product of ||M||^(1/2^k) is the norm of M^(2^m) to the power 1/2^m
    for _ in range(_SQUARINGS):
        norm = jnp.linalg.norm(matrix)
        bound = bound * norm**weight
        matrix = matrix / jnp.where(norm == 0, 1, norm)
        matrix = jnp.matmul(matrix, matrix, precision="highest")
        weight /= 2
    return bound * jnp.linalg.norm(matrix) ** weight


def _by_newton(matrix: Array, p: int, ridge: Numeric) -> Array:
    """`M <- T^p M`, `X <- X T` with `T = ((1 + p) I - M) / p`, from `M = c A` and `X = c^(1/p) I`.

    The step before is kept where rounding makes the residual grow.
    """
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    # the iteration converges where the eigenvalues of c A are below p + 1
    bound = _largest(matrix)
    zero = bound == 0
    wanted = jnp.asarray(ridge, matrix.dtype) * bound
    shift = at_least_rounding(wanted, bound)
    regular = matrix + shift * identity
    shifted = jnp.where(zero, identity, regular)
    largest = jnp.where(zero, 1, bound + shift)
    c = (1 + p) / (2 * largest)
    # the largest entry of M - I that rounding allows
    tolerance = 32 * jnp.finfo(matrix.dtype).eps

    def residual(m: Array) -> Array:
        return jnp.max(jnp.abs(m - identity))

    def goes_on(carry: tuple) -> Array:
        i, _, _, error, grows = carry
        return (i < _ITERATIONS) & (error > tolerance) & ~grows

    def step(carry: tuple) -> tuple:
        i, m, x, error, _ = carry
        with jax.default_matmul_precision("highest"):
            t = ((1 + p) * identity - m) / p
            power = jnp.linalg.matrix_power(t, p)
            new_m = symmetrize(power @ m)
            new_x = x @ t
        new_error = residual(new_m)
        grows = new_error > _GROWTH * error
        kept = jnp.where(grows, x, new_x)
        its_error = jnp.where(grows, error, new_error)
        return i + 1, new_m, kept, its_error, grows

    # M_0 = c A, X_0 = c^(1/p) I
    start = c * shifted
    root = c ** (1 / p) * identity
    size = residual(start)
    # nothing grows yet: a flag of the type of the residual, which may differ between devices
    first = (jnp.int32(0), start, root, size, size < 0)
    last = jax.lax.while_loop(goes_on, step, first)
    _, _, root, error, _ = last
    # NaN says that there is no root, so that no caller takes a bad one for good
    good = error <= _FAILED
    found = jnp.where(good, root, math.nan)
    return jnp.where(zero, 0, found)
