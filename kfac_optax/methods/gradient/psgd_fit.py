"""How PSGD fits a preconditioner on a group: relative steps of triangular or diagonal factors."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.linalg import lapack
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.in_order import after
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL
from kfac_optax.methods.gradient.axis_products import along, statistic
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.step_rules._per_layer import norms

Factors = dict[str, jax.Array]  # by axis: upper triangular [copies, n, n], or diagonals [copies, n]


def usual_probability(count: Any) -> jax.Array:
    """How often PSGD fits by default: in every one of the first 500 steps, then less and less, and
    from about step 4000 on in 3 of 100.

    >>> print(usual_probability(0), usual_probability(10_000).round(2))
    1.0 0.03
    """
    return jnp.clip(jnp.exp(-1e-3 * (count - 500.0)), 0.03, 1.0)


def started(q: Factors, h: jax.Array, scale: jax.Array | None) -> Factors:
    """Factors that are still zero become multiples of the identity, whose product is `scale`.

    By default it is `(mean h^2)^{-1/4}`, the minimum of `h^T P h + v^T P^{-1} v` over multiples of
    the identity, with the mean over `v`. Where `h` is zero they stay zero.

    >>> print(started({"0": jnp.zeros((1, 2))}, jnp.array([[0.25, 0.25]]), None)["0"])
    [[2. 2.]]
    """
    size = norms(h.reshape(len(h), 1, -1), mean=True)
    if scale is None:
        scale = positive_or_one(size) ** -0.5
    # zero also where the squares overflow: the next gradient decides
    usable = (size > 0) & jnp.isfinite(jnp.square(size))
    each = jnp.where(usable, scale, 0) ** (1 / len(q))
    out = {}
    for axis, x in q.items():
        # a matrix, or the diagonal of one
        matrix = x.ndim == 3
        one = jnp.eye(x.shape[-1], dtype=x.dtype) if matrix else jnp.ones((), x.dtype)
        new = _beside(each, x) * one
        out[axis] = jnp.where(_unset(x), new, x)
    return out


def fitted(
    q: Factors,
    h: jax.Array,
    v: jax.Array,
    rate: jax.Array,
) -> Factors:
    """One step of all factors on the pair `(h, v)`, `[copies, *block]` both.

    With `A = h x_1 Q_1 ... x_k Q_k` and `B = v x_1 Q_1^{-T} ... x_k Q_k^{-T}` every factor moves by
    `moved` with `mat_i(A) mat_i(A)^T` and `mat_i(B) mat_i(B)^T`. Copies without a gradient stay.
    """
    a, b = h, v
    for axis, x in q.items():
        a = along(a, int(axis), x)
        b = _against(b, int(axis), x)
    known = jnp.any(h != 0, axis=_behind_copies(h))
    out = {}
    for axis, x in q.items():
        kind = FULL if x.ndim == 3 else DIAGONAL
        of_h = statistic(a, int(axis), kind)
        of_v = statistic(b, int(axis), kind)
        new = moved(x, of_h, of_v, rate)
        # nothing is known of what has had no gradient, nor where the step is not finite
        good = known & jnp.all(jnp.isfinite(new), axis=_behind_copies(x))
        out[axis] = jnp.where(_beside(good, x), new, x)
    return balanced(out)


def fitted_groups(
    step: Step,
    factors: dict[str, Factors],
    h: dict[str, jax.Array],
    key: jax.Array,
) -> dict[str, Factors]:
    """All factors after one step, on random vectors of their own."""
    damping = step.value("damping")
    rate = step.value("fit_rate")
    out: dict[str, Factors] = {}
    for number, group in enumerate(step.groups):
        mine = h[group.name]
        own_key = jax.random.fold_in(key, number)
        v = jax.random.normal(own_key, mine.shape, mine.dtype)
        v = after(v, out)  # each group has triangular solves with it
        # h + damping |h| v, with the root mean square of every copy for its size
        squares = jnp.mean(jnp.square(mine), _behind_copies(mine), keepdims=True)
        damped = mine + damping * jnp.sqrt(squares) * v
        out[group.name] = fitted(factors[group.name], damped, v, rate)
    return out


def moved(
    q: jax.Array,
    of_h: jax.Array,
    of_v: jax.Array,
    rate: jax.Array,
) -> jax.Array:
    """`Q - rate / |S + T| triu(S - T) Q`, `S` and `T` the two terms, in the group of triangular
    matrices; entry by entry for a diagonal.

    The norm is at least the spectral norm: the largest sum of absolute values in a row. At a fixed
    point of the mean step `S` and `T` are equal.

    >>> print(moved(jnp.array([[2.0]]), jnp.array([[3.0]]), jnp.array([[1.0]]), jnp.float32(0.5)))
    [[1.5]]
    """
    total = jnp.abs(of_h + of_v)
    # sums over rows of a matrix; a diagonal is its own
    rows = total if q.ndim == 2 else jnp.sum(total, axis=-1)
    bound = jnp.max(rows, axis=-1)
    share = rate / positive_or_one(bound)
    difference = of_h - of_v
    # diagonals [copies, n], or upper triangular matrices, which stay such
    if q.ndim == 2:
        return q - share[:, None] * difference * q
    upper = jnp.triu(difference)
    product = jnp.matmul(upper, q, precision=jax.lax.Precision.HIGHEST)
    return q - share[:, None, None] * product


def balanced(q: Factors) -> Factors:
    """Factors of one size, the product as it was: rounding would fail where one is huge.

    >>> q = balanced({"0": jnp.array([[4.0]]), "1": jnp.array([[1.0]])})
    >>> print(q["0"], q["1"])
    [[2.]] [[2.]]
    """
    sizes = {}
    for axis, x in q.items():
        largest = jnp.max(jnp.abs(x), axis=_behind_copies(x))
        sizes[axis] = positive_or_one(largest)
    # the geometric mean, by logarithms: a product of sizes would overflow
    logarithms = sum(jnp.log(size) for size in sizes.values())
    mean = jnp.exp(logarithms / len(sizes))
    return {axis: x * _beside(mean / sizes[axis], x) for axis, x in q.items()}


def preconditioned(q: Factors, tensors: jax.Array) -> jax.Array:
    """`P G` with `P` the Kronecker product of all `Q_i^T Q_i`."""
    for axis, x in q.items():
        i = int(axis)
        # Q_i, then its transpose, which a diagonal is itself
        tensors = along(tensors, i, x)
        tensors = along(tensors, i, x if x.ndim == 2 else x.mT)
    return tensors


def _against(v: jax.Array, axis: int, q: jax.Array) -> jax.Array:
    """`v x_i Q_i^{-T}`; factors that are zero count as the identity."""
    # axis 0 is that of copies
    place = axis + 1
    if q.ndim == 2:
        shape = [1] * v.ndim
        shape[0], shape[place] = q.shape
        divisor = jnp.where(q != 0, q, 1)
        return v / divisor.reshape(shape)
    identity = jnp.eye(q.shape[-1], dtype=q.dtype)
    q = jnp.where(_unset(q), identity, q)
    # [copies, n, rest], solved, and back in place
    columns = jnp.moveaxis(v, place, 1)
    flat = columns.reshape(*columns.shape[:2], -1)
    solved = lapack.solve_triangular(q, flat, trans=1, lower=False)
    return jnp.moveaxis(solved.reshape(columns.shape), 1, place)


def _unset(q: jax.Array) -> jax.Array:
    """Which copies are zero, as an array beside them."""
    known = jnp.any(q != 0, axis=_behind_copies(q), keepdims=True)
    return ~known


def _behind_copies(x: jax.Array) -> tuple[int, ...]:
    """All axes but the first."""
    return tuple(range(1, x.ndim))


def _beside(numbers: jax.Array, q: jax.Array) -> jax.Array:
    """A number for every copy, with the axes of a factor."""
    ones = (1,) * (q.ndim - 1)
    return numbers.reshape(numbers.shape + ones)
