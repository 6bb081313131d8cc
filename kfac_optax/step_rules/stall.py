"""Hands gradients on as they are once the loss has stopped falling."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite
from kfac_optax._types import PyTree
from kfac_optax._validate import check_axis_name, check_number
from kfac_optax.step_rules.reduction_ratio import mean_over


class StallState(NamedTuple):
    """State of `until_stalled`."""

    preconditioner: PyTree
    stalled: jax.Array  # shape=(), dtype=bool: gradients are handed on, for good
    last_value: jax.Array  # shape=(), dtype=float32
    decrease: jax.Array  # shape=(), dtype=float32: average decrease of the loss in a step
    values_seen: jax.Array  # shape=(), dtype=int32: finite ones


def until_stalled(
    preconditioner: optax.GradientTransformation,
    *,
    threshold: float = 0.0,
    decay: float = 0.99,
    patience: int = 100,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A preconditioner until the loss falls too slowly, and from then on none.

    `d <- e d + (1 - e) (l_{t-1} - l_t)` with `l_t` the loss of a step and
    `e = min(1 - 1/k, decay)`, `k` counting the differences. In the first step with
    `d < threshold`, of at least `patience` differences, the gradient is handed on instead, and in
    all steps after it. The preconditioner then costs nothing any more. `update` needs `value=`, the
    loss of the batch; one that is not finite is left out. Gradients that are not finite become zero.

    Args:
      preconditioner: any transformation; extra arguments are handed on.
      threshold: least average decrease in a step.
      decay: bound of the averaging weight.
      patience: so many differences are seen before.
      axis_name: mapped axis over which the batch is split; losses are averaged over it.

    Returns:
      A transformation with `StallState`.

    Raises:
      TypeError: a schedule where a number is meant.
      ValueError: a number out of range; `value` missing in an update.

    >>> tx = until_stalled(optax.scale(2.0), threshold=0.5, patience=1)
    >>> g, state = jnp.ones(1), tx.init(jnp.ones(1))
    >>> for loss in (3.0, 2.0, 1.9):
    ...     u, state = tx.update(g, state, value=loss)
    ...     print(u, state.decrease.round(2))
    [2.] 0.0
    [2.] 1.0
    [2.] 0.55

    Reference: Mozaffari, Li, Zhang & Mehri Dehnavi, MKOR: Momentum-Enabled Kronecker-Factor-Based
      Optimizer Using Rank-1 Updates (2023), whose hybrid switches so.
    """
    where = "until_stalled"
    check_number(where, "threshold", threshold)
    check_number(where, "decay", decay, at_least=0, at_most=1)
    check_number(where, "patience", patience, at_least=1)
    check_axis_name(where, axis_name)
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> StallState:
        zero = jnp.zeros((), jnp.float32)
        start = preconditioner.init(params)
        no = jnp.zeros((), bool)
        count = jnp.zeros((), jnp.int32)
        return StallState(start, no, zero, jnp.zeros_like(zero), count)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        value: Any = None,
        **extra: Any,
    ):
        if value is None:
            raise ValueError(
                f"{where}.update: got no `value`; whether the loss still falls is seen from it. "
                "Pass tx.update(grads, state, params, value=loss, ...) with the loss of the batch."
            )
        state = _seen(state, mean_over(value, axis_name), decay)
        slow = (state.values_seen > patience) & (state.decrease < threshold)
        stalled = state.stalled | slow

        def handed_on() -> tuple[PyTree, PyTree]:
            good = all_finite(updates)
            plain = jax.tree.map(lambda x: jnp.where(good, x, 0), updates)
            return plain, state.preconditioner

        def preconditioned() -> tuple[PyTree, PyTree]:
            return preconditioner.update(
                updates, state.preconditioner, params, value=value, **extra
            )

        # a branch, not a choice: afterwards nothing is measured or solved for any more
        out, inner = jax.lax.cond(stalled, handed_on, preconditioned)
        return out, state._replace(preconditioner=inner, stalled=stalled)

    return optax.GradientTransformationExtraArgs(init, update)


def _seen(state: StallState, value: Any, decay: Any) -> StallState:
    """The averages with one more loss in them."""
    value = jnp.asarray(value, jnp.float32)
    good = jnp.isfinite(value)
    differences = state.values_seen.astype(jnp.float32)  # with this one; none of the first loss
    of_all = 1 - 1 / jnp.maximum(differences, 1)
    e = jnp.minimum(of_all, jnp.asarray(decay, jnp.float32))
    difference = state.last_value - value
    average = e * state.decrease + (1 - e) * difference
    counts = good & (state.values_seen > 0)
    return state._replace(
        last_value=jnp.where(good, value, state.last_value),
        decrease=jnp.where(counts, average, state.decrease),
        values_seen=state.values_seen + good.astype(jnp.int32),
    )
