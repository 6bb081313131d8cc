"""Cold start: plain steps at first, while the preconditioner already takes statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, check_legal, checked, start_checked


class ColdStartState(NamedTuple):
    """State of `cold_start`: that of both transformations and the step count."""

    preconditioner: PyTree
    cold: PyTree
    cold_count: Any  # shape=(), dtype=int32
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def cold_start(
    preconditioner: optax.GradientTransformation,
    *,
    steps: ScalarOrSchedule,
    initial: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The output of `initial` during the first steps, that of the preconditioner from then on.

    `U_k = initial(V_k)` for `k < steps`, counted from 0, else `preconditioner(V_k)`. Both see every
    gradient and every extra argument, so the statistics of the preconditioner are averages over
    `steps` batches when it takes over.

    Args:
      preconditioner: any transformation.
      steps: number of updates that `initial` makes.
      initial: default `optax.identity()`, the gradient; scale it for steps of a length of their
        own, `optax.scale(0.1)`.

    Returns:
      A transformation whose state holds both states.

    Raises:
      ValueError: `steps` negative.

    >>> tx = cold_start(optax.scale_by_sign(), steps=1)
    >>> state = tx.init(jnp.zeros(2))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([3.0, -4.0]), state)
    ...     print(updates)
    [ 3. -4.]
    [ 1. -1.]

    Reference: Wu, Mansimov, Liao, Grosse & Ba, Scalable trust-region method for deep reinforcement
      learning using Kronecker-factored approximation (2017); the authors' implementation starts
      with plain steps.
    """
    check_legal("cold_start", "steps", steps)
    warm = optax.with_extra_args_support(preconditioner)
    cold = optax.with_extra_args_support(optax.identity() if initial is None else initial)

    def init(params: PyTree) -> ColdStartState:
        given = start_checked(steps=steps)
        count = jnp.zeros((), jnp.int32)
        return ColdStartState(warm.init(params), cold.init(params), count, given)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        # both run in every step, so that both states go on
        later, warm_state = warm.update(updates, state.preconditioner, params, **extra)
        first, cold_state = cold.update(updates, state.cold, params, **extra)
        last, given = checked(state.given, "steps", steps, state.cold_count)
        cold_now = state.cold_count < last

        def choose(plain: jax.Array, preconditioned: jax.Array) -> jax.Array:
            chosen = jnp.where(cold_now, plain, preconditioned)
            return chosen.astype(preconditioned.dtype)

        count = optax.safe_increment(state.cold_count)
        new_state = ColdStartState(warm_state, cold_state, count, given)
        return jax.tree.map(choose, first, later), new_state

    return optax.GradientTransformationExtraArgs(init, update)
