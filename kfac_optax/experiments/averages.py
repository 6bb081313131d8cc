"""Averages of gradients in front of methods that take these in place of momentum."""

from typing import Any

import optax

from kfac_optax._tree import all_finite, select


def average_of_finite(decay: float) -> optax.GradientTransformation:
    """`optax.ema` of the finite gradients; others go past it as they are, for what follows to see."""
    average = optax.ema(decay)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new = average.update(updates, state, params)
        # one NaN would stay in the average for ever
        return select(all_finite(updates), new, (updates, state))

    return optax.GradientTransformation(average.init, update)
