"""The damping of the preconditioner chosen among three candidates, by the quadratic model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import PyTree
from kfac_optax.step_rules.reduction_ratio import DampingRule, quadratic_state


def search(
    rule: DampingRule,
    state: Any,
    attempt: Callable,
    adapt: bool | None,
) -> tuple[PyTree, PyTree, jax.Array]:
    """The update, the optimizer's state after it, and the `gamma^2` both were made with."""
    if rule.search_every is None:
        gamma = state.model_damping + jnp.asarray(rule.weight_decay, state.model_damping.dtype)
        return *attempt(gamma), gamma
    # gamma^2, smaller and larger by one factor
    factor = rule.decay**rule.search_every if rule.search_decay is None else rule.search_decay
    now = state.preconditioner_damping
    smaller = jnp.maximum(now * factor, rule.damping_min)
    larger = jnp.minimum(now / factor, rule.damping_max)

    def change_of(gamma: jax.Array) -> jax.Array:
        _, after = attempt(gamma)
        return _damped_change(rule.where, after)

    def best() -> jax.Array:
        # each candidate solves anew from the same statistics; a loop, so that it is compiled once
        gammas = jnp.stack([now, smaller, larger])
        return gammas[lowest(jax.lax.map(change_of, gammas))]

    # the period's last step, so that the state has seen a whole one
    due = state.damping_count % rule.search_every == rule.search_every - 1
    gamma = jax.lax.cond(due, best, lambda: now)
    # outside the branch, where its products share the forward pass of the gradient
    return *attempt(gamma), gamma


def lowest(changes: jax.Array) -> jax.Array:
    """Index of the lowest one; the first where that is not a number, which nothing is below."""
    comparable = jnp.where(jnp.isnan(changes), jnp.inf, changes)
    return jnp.where(jnp.isnan(changes[0]), 0, jnp.argmin(comparable))


def _damped_change(where: str, after: PyTree) -> jax.Array:
    known = quadratic_state(after)
    if known is None:
        raise ValueError(
            f"{where}: search_every needs quadratic_step inside the optimizer; found none in its "
            "state."
        )
    return known.damped_change
