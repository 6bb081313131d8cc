"""Numbers of presets that blocks and rules take as they are, checked in every update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import PyTree
from kfac_optax._validate import Checked, checked, resolve, start_checked

# What presets hand on to blocks, couplings and rules that have no state to count in.
HANDED_ON = (
    "fine_weight",
    "coarse_weight",
    "initial_damping",
    "weight_decay",
    "adapt_every",
    "damping_decay",
    "damping_min",
    "damping_max",
    "reject_below",
    "correct_every",
    "norm_constraint",
    "refresh_above",
    "freeze_below",
    "root_rate",
    "root_momentum",
    "critical",
    "threshold",
    "mixing",
    "largest",
    "least_decrease",
    "decrease_decay",
    "patience",
)


class GivenState(NamedTuple):
    """State of a transformation whose numbers are known only in an update."""

    inner: PyTree
    given_count: Any  # shape=(), dtype=int32: steps, which schedules follow
    given: dict[str, Checked]  # the numbers, as far as they made sense


def unknown_numbers(words: Mapping[str, Any], schedules: tuple[str, ...]) -> dict[str, Any]:
    """The words whose values are known only in an update, and that nothing else checks.

    Args:
      words: of a preset.
      schedules: those besides `HANDED_ON`, which may be schedules too.
    """
    # arrays everywhere, schedules where the preset has a rule for them
    return {
        word: value
        for word, value in words.items()
        if (word in HANDED_ON + schedules and isinstance(value, jax.Array))
        or (word in schedules and callable(value))
    }


def with_checked(
    make: Callable[..., optax.GradientTransformation],
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    """`make(**numbers)`, where a number that is out of range, or none, counts as the last good one.

    The transformation is made again in every update, with what is good then, as
    `optax.inject_hyperparams` does.

    Args:
      make: makes the transformation; the structure of its state depends on no number.
      **numbers: arrays or schedules, each a name in `LEGAL`.

    >>> tx = with_checked(lambda weight_decay: optax.scale(weight_decay), weight_decay=jnp.array(0.5))
    >>> bad = with_checked(lambda weight_decay: optax.scale(weight_decay), weight_decay=jnp.array(-1.0))
    >>> updates, state = bad.update(jnp.ones(()), tx.init(jnp.ones(())))
    >>> print(updates, state.given["given_weight_decay"].ignored_values)
    0.5 1
    """

    def init(params: PyTree) -> GivenState:
        # the number in use before any was legal
        memory = start_checked(**{name: _cautious(name, x) for name, x in numbers.items()})
        first = {name: memory[f"given_{name}"].last_good for name in numbers}
        inner = optax.with_extra_args_support(make(**first)).init(params)
        return GivenState(inner, jnp.zeros((), jnp.int32), memory)

    def update(updates, state, params=None, **extra):
        used: dict[str, Any] = {}
        memory = state.given
        for name, value in numbers.items():
            used[name], memory = checked(memory, name, value, state.given_count)
        # made in every update, of numbers that are legal by now; the state's form stays
        tx = optax.with_extra_args_support(make(**used))
        updates, inner = tx.update(updates, state.inner, params, **extra)
        return updates, GivenState(inner, optax.safe_increment(state.given_count), memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _cautious(name: str, value: Any) -> Any:
    """Before any good rate no step is made: that of a whole optimizer has no default."""
    if name != "learning_rate":
        return value
    first = jnp.asarray(resolve(value, jnp.zeros((), jnp.int32)))
    return jnp.where(jnp.isfinite(first) & (first >= 0), first, 0)
