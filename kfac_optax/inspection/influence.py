"""What single training examples have done to a model: influence functions by inverse products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._tree import inner, wide_dtype
from kfac_optax._types import PyTree
from kfac_optax._validate import check_number
from kfac_optax.inspection.examples import map_examples

Solve = Callable[[PyTree], PyTree]


def influence(
    objective: Callable[[PyTree], jax.Array],
    losses: Callable[[PyTree], jax.Array],
    params: PyTree,
    solve: Solve,
    *,
    size: Any = None,
) -> Float[Array, " n"]:
    """By how much an objective rises, to first order, when a training example is left out.

    `I_b = (1/N) grad objective^T H^{-1} grad loss_b` for every example, with `H` the curvature of
    the mean training objective at its minimum. One gradient, one solve and one forward-mode pass
    over all examples.

    Args:
      objective: `params -> scalar`, what is asked about: the loss of test examples, an output.
      losses: `params -> [n]`, of the training examples in question, one each.
      params: of the trained model.
      solve: `v -> H^{-1} v`, trees like the parameters: `Posterior.inverse_product`,
        `inverse_product` with layers and state filled in, `lissa`, or a conjugate gradient.
      size: number of training examples `N`; default `n`.

    Returns:
      `[n]`; positive where the example has helped.

    Raises:
      ValueError: the losses are no vector.

    >>> w, x = jnp.array([1.0]), jnp.array([1.0, 2.0])
    >>> print(influence(lambda w: 3 * w[0], lambda w: w * x, w, lambda v: v / 5))
    [0.3 0.6]

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions (2017),
      equations 1 and 2, with the sign of leaving out.
    """
    # H^{-1} grad objective once, then its slope along every loss in one pass
    direction = solve(jax.grad(objective)(params))
    _, slopes = jax.jvp(losses, (params,), (direction,))
    if slopes.ndim != 1:
        raise ValueError(
            f"influence: losses returned an array {list(slopes.shape)}; expected [n], one loss for "
            "every training example."
        )
    return slopes / (len(slopes) if size is None else size)


def self_influence(
    losses: Callable[..., jax.Array],
    params: PyTree,
    solve: Solve,
    *args: PyTree,
    size: Any = None,
    batch_size: int = 32,
) -> Float[Array, " n"]:
    """By how much the loss of an example itself rises, to first order, when it is left out.

    `I_b = (1/N) grad loss_b^T H^{-1} grad loss_b`: large where a model had to learn an example by
    heart, as it has to with wrong labels. A gradient and a solve for every example.

    Args:
      losses: `(params, *args) -> [n]`, one for every example; it is called with one at a time.
      params: of the trained model.
      solve: as for `influence`.
      *args: arrays with the examples on axis 0; others are the same for all.
      size: number of training examples `N`; default `n`.
      batch_size: examples at the same time.

    Raises:
      ValueError: an example has several losses, or there are no examples.

    >>> w, x = jnp.array([1.0]), jnp.array([1.0, 2.0])
    >>> print(self_influence(lambda w, x: w * x, w, lambda v: v / 2, x))
    [0.25 1.  ]

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions (2017),
      section 5.4.
    """

    def of_example(*own: PyTree) -> jax.Array:
        # each example against its own solve
        def loss(params: PyTree) -> jax.Array:
            return _the_loss(losses(params, *own))

        gradient = jax.grad(loss)(params)
        return inner(gradient, solve(gradient))

    scores = map_examples(of_example, args, batch_size)
    return scores / (len(scores) if size is None else size)


def lissa(
    product: Callable[..., PyTree],
    *,
    scale: float,
    damping: float = 0.0,
    steps: int = 100,
    stochastic: bool = False,
) -> Solve:
    """A solve that needs products with the curvature only,
    `x <- x + (v - (H + damping I) x) / scale`.

    Converges where the largest eigenvalue of `H + damping I` is below `2 scale`, at the rate
    `1 - (smallest eigenvalue) / scale` per step. A recursion that has diverged gives NaN, not
    numbers.

    Args:
      product: `v -> H v`, such as `lambda v: estimator.vector_product(params, v, x)`; with
        `stochastic` it is `(v, step) -> H_step v`, of another batch in every step.
      scale: at least half the largest eigenvalue; of the size of that for stochastic products.
      damping: added to the curvature: of a prior or weight decay, and what makes it invertible.
      steps: how many products.
      stochastic: whether the product differs between steps. Its noise decides how exact the result
        is; average several.

    Returns:
      A function `v -> (H + damping I)^{-1} v`.

    Raises:
      ValueError: a number out of range.

    >>> solve = lissa(lambda v: jnp.array([2.0, 1.0]) * v, scale=2.0, damping=1.0)
    >>> print(solve(jnp.ones(2)).round(3))
    [0.333 0.5  ]

    Reference: Agarwal, Bullins & Hazan, Second-Order Stochastic Optimization for Machine Learning
      in Linear Time (2017); Koh & Liang (2017), section 3.
    """
    check_number("lissa", "scale", scale, above=0)
    check_number("lissa", "damping", damping, at_least=0)
    check_number("lissa", "steps", steps, at_least=2)

    def residual(v: PyTree, x: PyTree, step: Any) -> PyTree:
        # v - (H + damping I) x
        curved = product(x, step) if stochastic else product(x)
        return jax.tree.map(lambda b, c, y: b - c - damping * y, v, curved, x)

    def move(v: PyTree, x: PyTree, step: Any) -> PyTree:
        return jax.tree.map(lambda y, r: y + r / scale, x, residual(v, x, step))

    def solve(v: PyTree) -> PyTree:
        wide = wide_dtype(v)

        def step(i: Any, x: PyTree) -> PyTree:
            return move(v, x, i)

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), v)
        # two loops, since a stochastic residual is judged from the middle on
        half = steps // 2
        middle = jax.lax.fori_loop(0, half, step, start)
        end = jax.lax.fori_loop(half, steps, step, middle)
        if stochastic:
            # the mean of the residuals since the middle: a single one is noise
            left = jax.tree.map(lambda x, y: (x - y) * scale / (steps - half), end, middle)
        else:
            left = residual(v, end, steps)
        converges = inner(left, left) <= inner(v, v)  # as x = 0 would have it

        def checked(x: jax.Array, like: jax.Array) -> jax.Array:
            return jnp.where(converges, x, jnp.nan).astype(like.dtype)

        return jax.tree.map(checked, end, v)

    return solve


def _the_loss(losses: jax.Array) -> jax.Array:
    if losses.shape != (1,):
        raise ValueError(
            f"self_influence: losses of one example returned an array {list(losses.shape)}; "
            "expected [1]: one loss for every example, which axis 0 of the arguments counts."
        )
    return losses[0]
