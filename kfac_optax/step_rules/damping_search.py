"""The damping of the preconditioner chosen among three candidates, by the quadratic model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import select
from kfac_optax._types import PyTree
from kfac_optax.step_rules.reduction_ratio import DampingRule, quadratic_state


def search(
    rule: DampingRule, state: Any, attempt: Callable, adapt: bool | None
) -> tuple[PyTree, PyTree, jax.Array]:
    """The update, the optimizer's state after it, and the `gamma^2` both were made with."""
    if rule.search_every is None:
        gamma = state.model_damping + jnp.asarray(rule.weight_decay, state.model_damping.dtype)
        return *attempt(gamma), gamma
    # gamma^2, smaller and larger by one factor
    factor = rule.decay**rule.search_every if rule.search_decay is None else rule.search_decay
    now = state.preconditioner_damping

    def best() -> tuple[PyTree, PyTree, jax.Array]:
        gammas = [
            now,
            jnp.maximum(now * factor, rule.damping_min),
            jnp.minimum(now / factor, rule.damping_max),
        ]
        # each candidate solves anew from the same statistics
        tried = [(*attempt(gamma), gamma) for gamma in gammas]
        changes = [_damped_change(rule.where, after) for _, after, _ in tried]
        chosen, lowest = tried[0], changes[0]
        others = zip(tried[1:], changes[1:], strict=True)
        for other, change in others:
            better = change < lowest  # false for what is not finite
            chosen = select(better, other, chosen)
            lowest = jnp.where(better, change, lowest)
        return chosen

    def keep() -> tuple[PyTree, PyTree, jax.Array]:
        return *attempt(now), now

    # the period's last step, so that the state has seen a whole one
    due = state.damping_count % rule.search_every == rule.search_every - 1
    return jax.lax.cond(due, best, keep)


def _damped_change(where: str, after: PyTree) -> jax.Array:
    known = quadratic_state(after)
    if known is None:
        raise ValueError(
            f"{where}: search_every needs quadratic_step inside the optimizer; found none in its "
            "state."
        )
    return known.damped_change
