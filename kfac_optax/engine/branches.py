"""What is due in a step, and the branch that it is done in."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.engine import stagger
from kfac_optax.engine.state import CurvatureState

# fields of the state that a change writes, and that pass through its branch
STATISTICS = (
    "factors",
    "curvature_count",
    "skipped_statistics",
    "coarse",
    "inverses",
    "failed_inverses",
)
BLOCKS = ("inverses", "failed_inverses", "inverse_age")
COARSE = ("failed_inverses", "coarse")
INVERSES = (*BLOCKS, "coarse")


def due_at(count: jax.Array, every: Any) -> jax.Array:
    """Whether something with this period is due at a step."""
    # hyperparameters injected by Optax are floats, periods included
    return count % jnp.asarray(every).astype(jnp.int32) == 0


def parts_due(state: CurvatureState, every: Any, parts: int) -> tuple[jax.Array, ...]:
    """Which parts of the inverses are due; all of them at first."""
    if parts == 1:
        return (due_at(state.kfac_count, every),)
    # parts that no period has reached yet still hold the inverses of the start
    every = jnp.asarray(every).astype(jnp.int32)
    first = (state.kfac_count == 0) | (state.inverse_age > state.kfac_count)
    return tuple(
        first | (state.kfac_count % every == stagger.phase(j, every, parts)) for j in range(parts)
    )


def when(
    due: Any,
    change: Any,
    state: CurvatureState,
    fields: tuple[str, ...],
    view: Any = lambda state: state,
) -> CurvatureState:
    """`change(view(state))` where due; only the fields that can change pass through the branch, as
    `view` shows them.
    """
    # known while tracing: no branch is compiled
    if isinstance(due, bool):
        return change(view(state)) if due else view(state)

    def changed(_: None) -> tuple:
        new = change(view(state))
        return tuple(getattr(new, name) for name in fields)

    def same(_: None) -> tuple:
        old = view(state)
        return tuple(getattr(old, name) for name in fields)

    values = jax.lax.cond(due, changed, same, None)
    return state._replace(**dict(zip(fields, values, strict=True)))
