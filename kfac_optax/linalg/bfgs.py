"""Inverse Hessians from pairs of differences: BFGS as a matrix or by its last pairs, with damping
that keeps them definite and bounded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._tree import all_finite, select
from kfac_optax.linalg.division import quotient_or_zero


class Pairs(NamedTuple):
    """The last pairs of L-BFGS, the oldest first; zeros stand for none."""

    steps: Float[Array, "m n"]
    changes: Float[Array, "m n"]  # of the gradient


def apply_bfgs(
    kept: Float[Array, "n n"] | Pairs,
    v: Float[Array, "k n"],
    *,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "k n"]:
    """`V H`, by the matrix, or by two passes over the pairs, which start from the identity.

    >>> pairs = Pairs(jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0]]))
    >>> print(apply_bfgs(pairs, jnp.array([[4.0, 4.0]]), precision="highest"))
    [[2. 4.]]
    """
    if not isinstance(kept, Pairs):
        return jnp.matmul(v, kept, precision=precision)
    # 1 / s^T y, zero where there is no pair: then both passes leave V as it is
    products = jnp.sum(kept.steps * kept.changes, 1)
    one = jnp.ones((), products.dtype)
    rates = quotient_or_zero(one, products)

    def along(v: Array, x: Array) -> Array:
        return jnp.matmul(v, x, precision=precision)

    def back(v: Array, pair: tuple) -> tuple[Array, Array]:
        s, y, rate = pair
        share = rate * along(v, s)
        return v - jnp.outer(share, y), share

    def forth(v: Array, pair: tuple) -> tuple[Array, None]:
        s, y, rate, share = pair
        rest = share - rate * along(v, y)
        return v + jnp.outer(rest, s), None

    # from the newest pair to the oldest, and back again
    pairs = (*kept, rates)
    v, shares = jax.lax.scan(back, v, pairs, reverse=True)
    v, _ = jax.lax.scan(forth, v, (*pairs, shares))
    return v


def add_pair(
    kept: Float[Array, "n n"] | Pairs,
    step: Float[Array, " n"],
    change: Float[Array, " n"],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "n n"] | Pairs:
    """What is kept with one pair more, `H <- (I - s y^T / s^T y) H (I - y s^T / s^T y) + s s^T /
    s^T y`.

    A pair without positive curvature, or with a result that is not finite, is left out.

    >>> print(add_pair(jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0])))
    [[0.5 0. ]
     [0.  1. ]]
    """
    product = jnp.vdot(step, change, precision=precision)
    good = product > 0
    new: Array | Pairs
    if isinstance(kept, Pairs):
        # the oldest makes room
        steps = jnp.concatenate([kept.steps[1:], step[None]])
        changes = jnp.concatenate([kept.changes[1:], change[None]])
        new = Pairs(steps, changes)
    else:
        new = _updated(kept, step, change, product, precision)
    good = good & all_finite((new, product))
    return select(good, new, kept)


def _updated(
    matrix: Array,
    step: Array,
    change: Array,
    product: Array,
    precision: Any,
) -> Array:
    """`H - (H y s^T + s y^T H) / s^T y + (1 + y^T H y / s^T y) s s^T / s^T y`."""
    rate = quotient_or_zero(jnp.ones((), product.dtype), product)
    # H y s^T, and y^T H y / s^T y
    moved = jnp.matmul(matrix, change, precision=precision)
    cross = jnp.outer(moved, step)
    size = rate * jnp.vdot(change, moved, precision=precision)
    square = jnp.outer(step, step)
    return matrix - rate * (cross + cross.T) + rate * (1 + size) * square


def double_damped(
    kept: Float[Array, "n n"] | Pairs,
    step: Float[Array, " n"],
    change: Float[Array, " n"],
    *,
    inverse_bound: Array | float,
    bound: Array | float,
    precision: jax.lax.PrecisionLike = "highest",
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """A pair that keeps BFGS positive definite and bounded, also where the loss is not convex.

    Powell's damping of the step first: where `s^T y < inverse_bound y^T H y`, `s` goes towards
    `H y` until they are equal. Then of the change: where `s^T y < bound s^T s`, `y` goes towards
    `s`.

    Args:
      kept: `H`, as a matrix or pairs.
      step: `s`.
      change: `y`.
      inverse_bound: in [0, 1).
      bound: in [0, 1]; afterwards `s^T y >= bound s^T s`.
      precision: of products.

    >>> s, y = double_damped(jnp.eye(1), jnp.ones(1), -jnp.ones(1), inverse_bound=0.2, bound=0.5)
    >>> print(s.round(3), y)
    [-0.2] [-1.]

    Reference: Goldfarb, Ren & Bahamou, Practical Quasi-Newton Methods for Training Deep Neural
      Networks (2020), double damping.
    """
    # H y, by which the step is damped; the new step damps the change
    moved = apply_bfgs(kept, change[None], precision=precision)[0]
    step = _towards(step, moved, change, inverse_bound, precision)
    change = _towards(change, step, step, bound, precision)
    return step, change


def _towards(
    x: Array,
    other: Array,
    along: Array,
    bound: Array | float,
    precision: Any,
) -> Array:
    """`x`, moved towards `other` as far as `x^T along >= bound other^T along` asks for."""
    size = jnp.vdot(other, along, precision=precision)
    product = jnp.vdot(x, along, precision=precision)
    short = product < bound * size
    # the share at which x^T along is the bound times the size
    gap = jnp.where(short, size - product, 1)
    theta = (1 - bound) * size / gap
    moved = theta * x + (1 - theta) * other
    return jnp.where(short, moved, x)
