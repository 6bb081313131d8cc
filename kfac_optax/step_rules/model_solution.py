"""The minimum of a quadratic model of a few directions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class ModelSolution(NamedTuple):
    """Weights of the directions, and whether the model has a minimum along the first."""

    rate: Float[Array, ""]  # of the first
    momentum: Float[Array, ""]  # of the last
    finite: jax.Array  # bool
    convex: jax.Array  # bool
    weights: Float[Array, " k"]  # of all


def solve_model(
    form: Float[Array, "k k"],
    slope: Float[Array, " k"],
    *,
    learning_rate: Any = None,
    momentum: Any = None,
) -> ModelSolution:
    """Minimises `slope^T w + w^T form w / 2` over all entries of `w`, or over those that are not
    given.

    A direction without curvature (no previous step) gets the weight zero, and so does one that
    depends on those before it to working precision. Where nothing is finite, or the first direction
    has no positive curvature although the model falls along it, all weights are zero.

    Args:
      form: `K`, curvature along the directions: what the preconditioner made, part by part, and
        last the previous step.
      slope: `b`, gradient along them.
      learning_rate: fixes the first weight.
      momentum: fixes the last.

    >>> solution = solve_model(jnp.array([[2.0, 0.0], [0.0, 4.0]]), jnp.array([-2.0, -2.0]))
    >>> print(solution.rate, solution.momentum)
    1.0 0.5

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), section 7, for two directions.
    """
    finite = jnp.isfinite(form).all() & jnp.isfinite(slope).all()
    # d^T (F + damping I) d of the update; where it vanishes the slope has to vanish too
    first = form[0, 0]
    flat = (first == 0) & (slope[0] == 0)
    convex = (first > 0) | flat
    # the parts between the first and the last are always solved for
    between = [None] * (len(slope) - 2)
    given = [learning_rate, *between, momentum]
    weights = _minimise(form, slope, given)
    finite = finite & jnp.all(jnp.isfinite(weights))  # what is given may be anything
    weights = jnp.where(finite & convex, weights, 0)
    return ModelSolution(weights[0], weights[-1], finite, convex, weights)


def _minimise(
    form: jax.Array,
    slope: jax.Array,
    given: Sequence[Any],
) -> jax.Array:
    """Weights of the minimum, by eliminating one direction after another; `None` in `given` is
    solved for.

    No factorisation of LAPACK's: a step has a few directions, and such calls must not run beside
    those of the inverses.
    """
    zero = jnp.zeros((), form.dtype)
    known = [zero if x is None else x for x in given]
    fixed = jnp.stack([jnp.asarray(x, form.dtype) for x in known])
    free = [i for i, x in enumerate(given) if x is None]
    # K w = -b for the free weights, those that are fixed on the right-hand side
    slope = slope + jnp.sum(form * fixed, axis=1)
    limit = 64 * jnp.finfo(form.dtype).eps
    rows = {i: form[i] for i in free}
    right = {i: -slope[i] for i in free}
    usable: dict[int, jax.Array] = {}
    # forward elimination; a pivot that is rounding of its row depends on those before it
    for n, i in enumerate(free):
        pivot = rows[i][i]  # what is left of the curvature, a Schur complement
        usable[i] = pivot > limit * form[i, i]
        for j in free[n + 1 :]:
            divisor = jnp.where(usable[i], pivot, 1)
            factor = jnp.where(usable[i], rows[j][i] / divisor, 0)
            rows[j] = rows[j] - factor * rows[i]
            right[j] = right[j] - factor * right[i]
    weights = list(fixed)
    # back substitution
    for n, i in reversed(list(enumerate(free))):
        row = rows[i]
        known = sum((row[j] * weights[j] for j in free[n + 1 :]), zero)
        rest = right[i] - known
        divisor = jnp.where(usable[i], row[i], 1)
        weights[i] = jnp.where(usable[i], rest / divisor, 0)
    return jnp.stack(weights)


def agreed_mix(form: Float[Array, "k k"], slope: Float[Array, " k"]) -> Float[Array, " k"]:
    """Shares of the parts of an update, one for the first: the second enters as far as the model
    agrees with it.

    `(1, w)` with `w = min(1, max(0, w_2 / w_1))`, `w_1` and `w_2` the weights that minimise
    `slope^T w + w^T form w / 2`. Along `(1, w)` the model falls at least as far as along the first
    alone: `-(slope^T d)^2 / (2 d^T form d)` has its only minimum over `d = (1, w)` at `w_2 / w_1`.

    >>> print(agreed_mix(jnp.array([[2.0, 0.0], [0.0, 8.0]]), jnp.array([-2.0, -2.0])))
    [1.   0.25]
    """
    one = jnp.ones((1,), form.dtype)
    # the fine part alone
    if len(slope) == 1:
        return one
    fine, coarse = _minimise(form, slope, [None, None])
    finite = jnp.isfinite(fine) & jnp.isfinite(coarse)
    usable = (fine > 0) & finite
    # w_2 / w_1 in [0, 1]; nothing of the coarse part where the fine one would go backwards
    ratio = coarse / jnp.where(usable, fine, 1)
    share = jnp.where(usable, jnp.clip(ratio, 0, 1), 0)
    return jnp.append(one, share)
