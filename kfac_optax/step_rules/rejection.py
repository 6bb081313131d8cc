"""Steps that are measured, and taken back where the objective says so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import PyTree


def if_due(due: Any, measure: Callable[[], tuple[jax.Array, jax.Array]]) -> Any:
    """What is measured where it is due, NaN in its place where it is not."""
    if due is True:
        return measure()
    # a branch, so that an ordinary step costs no evaluation
    shapes = jax.eval_shape(measure)

    def nothing() -> Any:
        new_value, change = (jnp.full(x.shape, jnp.nan, x.dtype) for x in shapes)
        return new_value, change

    return jax.lax.cond(due, measure, nothing)


def reject(
    step: PyTree,
    after: PyTree,
    before: PyTree,
    found: tuple,
    new_value: jax.Array,
):
    """Takes the step back where its ratio says so; curvature that was measured stays."""
    ratio, failed, due, lowest = found
    # NaN counts as too low; -inf switches rejection off
    enough = ratio >= lowest.astype(ratio.dtype)
    low = (lowest > -jnp.inf) & ~enough
    bad = low | ~jnp.isfinite(new_value)
    rejected = jnp.asarray(due) & bad & ~failed  # a step without a model is zero already

    def is_curvature(node: Any) -> bool:
        return hasattr(node, "curvature_count")

    def keep(new: Any, old: Any) -> Any:
        return new if is_curvature(new) else jnp.where(rejected, old, new)

    # the curvature that was measured is good whatever became of the step
    step = jax.tree.map(lambda x: jnp.where(rejected, 0, x).astype(x.dtype), step)
    kept = jax.tree.map(keep, after, before, is_leaf=is_curvature)
    return step, kept, rejected
