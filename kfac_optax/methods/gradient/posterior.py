"""What Vadam and VOGN share: the mean of a diagonal Gaussian posterior, moved by its own variance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax.bayes.diagonal import DiagonalPosterior
from kfac_optax.linalg.division import quotient_or_zero
from kfac_optax.methods.gradient.treewise import (
    Made,
    Rule,
    Step,
    finite_as_one,
    transformation,
    zeros,
)


def follow_posterior(
    where: str,
    squares_of: Callable[[Step], PyTree],
    power: float,
    **hyper: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """`U = m / (s^power + w + damping)` with `m` the mean of `g + w theta` and `s` that of squares.

    Args:
      where: name of the method.
      squares_of: what is averaged in `s`, a tree like the gradient.
      power: of the squares' mean.
      **hyper: `weight_decay` (`w`), `damping`, `b1`, `b2`.
    """

    def start(params: PyTree, dtype: Any) -> DiagonalPosterior:
        count = jnp.zeros((), jnp.int32)
        return DiagonalPosterior(zeros(params, dtype), zeros(params, dtype), count)

    def step(given: Step) -> Made:
        if given.params is None:
            raise ValueError(
                f"{where}.update got no params, the mean of the posterior to which the prior draws "
                "it. Pass them: tx.update(grads, opt_state, params)."
            )
        old, now = given.held, given.now
        w = now["weight_decay"]
        t = old.count + 1
        squares = squares_of(given)

        # m of the gradient of the posterior, to which the prior adds w theta
        def mean_of(m: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
            return _averaged(m, g + w * p.astype(g.dtype), now["b1"], t)

        def squares_with(s: jax.Array, new: jax.Array) -> jax.Array:
            return _averaged(s, new, now["b2"], t)

        mean = jax.tree.map(mean_of, old.mean, given.gradient, given.params)
        s = jax.tree.map(squares_with, old.squares, squares)

        def direction(m: jax.Array, s: jax.Array) -> jax.Array:
            divisor = s**power + w + now["damping"]
            # only without weight decay, where there has been no gradient
            return quotient_or_zero(m, divisor)

        out = jax.tree.map(direction, mean, s)
        held = DiagonalPosterior(mean, s, t)
        skipped = given.finite & ~finite_as_one(squares)
        return Made(out, held, True, skipped)

    return transformation(Rule(where, dict(hyper), start, step))


def _averaged(
    old: jax.Array,
    new: jax.Array,
    b: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """The mean of `t` numbers with weights `b^age`: Adam's average, corrected for its start."""
    t = t.astype(b.dtype)
    # the weight of what came before, (b - b^t) / (1 - b^t); 1 - 1 / t where all count the same
    decays = b < 1
    divisor = jnp.where(decays, 1 - b**t, 1)
    share = jnp.where(decays, (b - b**t) / divisor, 1 - 1 / t)
    # the first is the mean of itself
    share = jnp.where(t > 1, share, 0)
    return share * old + (1 - share) * new
