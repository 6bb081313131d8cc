"""What hyperparameters may be, by name."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Legal(NamedTuple):
    """What a hyperparameter may be, and what is used before it has been that; all are finite."""

    default: float
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None


# An int32 step count is divided by periods.
_PERIOD = {"at_least": 1, "at_most": 2**30}

LEGAL = {
    "damping": Legal(1e-3, at_least=0),
    "decay": Legal(0.95, at_least=0, at_most=1),
    "curvature_every": Legal(10, **_PERIOD),
    "inverse_every": Legal(100, **_PERIOD),
    "learning_rate": Legal(1.0, at_least=0),  # no default: a large rate makes clips cautious
    "kl_clip": Legal(1e-3, above=0),
    "radius": Legal(1e-3, above=0),
    "max_rms": Legal(1.0, above=0),
    "weight_decay": Legal(0.0, at_least=0),
    "steps": Legal(0.0, at_least=0),
    "start_step": Legal(0.0, at_least=0),
    "ridge": Legal(1e-6, at_least=0),
    "momentum": Legal(0.9, at_least=0, at_most=1),
    "b1": Legal(0.9, at_least=0, at_most=1),
    "b2": Legal(0.999, at_least=0, at_most=1),
    "eps": Legal(1e-8, at_least=0),
    "fine_weight": Legal(1.0, at_least=0),
    "coarse_weight": Legal(1.0, at_least=0),
    "initial_damping": Legal(0.03, above=0),
    "adapt_every": Legal(5, **_PERIOD),
    "damping_decay": Legal(0.95, above=0, at_most=1),
    "damping_min": Legal(0.01, at_least=0),
    "damping_max": Legal(1e8, above=0),
    "reject_below": Legal(0.0),
    "correct_every": Legal(10, **_PERIOD),
    "norm_constraint": Legal(1e-3, above=0),
    "refresh_above": Legal(0.01, at_least=0),
    "freeze_below": Legal(0.001, at_least=0),
    "root_rate": Legal(1e-2, above=0, at_most=1),
    "root_momentum": Legal(0.5, at_least=0, at_most=0.999),
    "critical": Legal(10, at_least=0),
    "threshold": Legal(2.0, above=0),
    "mixing": Legal(0.9, at_least=0, at_most=1),
    "largest": Legal(100.0, above=0),
    "least_decrease": Legal(0.0),
    "decrease_decay": Legal(0.99, at_least=0, at_most=1),
    "patience": Legal(100, at_least=1),
    "power": Legal(1.0, at_least=0, at_most=2),
    "fit_rate": Legal(0.1, above=0, at_most=1),
    "fit_probability": Legal(1.0, at_least=0, at_most=1),
}


def is_legal(name: str, value: jax.Array) -> jax.Array:
    """Whether a number that is known only in an update is in its range, and a number."""
    legal = LEGAL[name]
    # NaN is in no range
    good = jnp.isfinite(value)
    if legal.above is not None:
        good = good & (value > legal.above)
    if legal.at_least is not None:
        good = good & (value >= legal.at_least)
    if legal.at_most is not None:
        good = good & (value <= legal.at_most)
    return good
