"""Hyperparameters that change with the epoch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def piecewise(*, epochs: Sequence[int], values: Sequence[float], steps: int, where: str = "piecewise") -> Schedule:
    """`values[i]` until `epochs[i]` epochs are over, the last value from then on.

    Args:
        epochs: increasing, one fewer than the values.
        values: of the stages.
        steps: mini-batches of an epoch.
        where: named in errors.

    Returns:
        The value as a function of the step, counted from 0.

    Raises:
        ValueError: epochs that do not increase, or another number of values.

    >>> halved = piecewise(epochs=(2,), values=(1.0, 0.5), steps=10)
    >>> print(halved(19), halved(20))
    1.0 0.5
    """
    if len(values) != len(epochs) + 1:
        raise ValueError(f"{where}: got {len(values)} values, expected {len(epochs) + 1}, one more than epochs")
    if any(later <= earlier for earlier, later in zip((0, *epochs), epochs, strict=False)):
        raise ValueError(f"{where}: got epochs {tuple(epochs)}, expected increasing positive numbers")
    starts = [epoch * steps for epoch in epochs]

    def schedule(step: jax.Array) -> jax.Array:
        stage = jnp.sum(jnp.asarray(step) >= jnp.asarray(starts, jnp.int32))
        return jnp.asarray(values, jnp.float32)[stage]

    return schedule


def rate_factor(section: Mapping[str, Any] | None, *, steps: int) -> Schedule | None:
    """What `config.schedule` multiplies the learning rate with, or None where it never changes."""
    if not section:
        return None
    return piecewise(epochs=section["epochs"], values=section["factors"], steps=steps, where="config.schedule")


def resolve(options: Mapping[str, Any], *, steps: int, where: str) -> dict[str, Any]:
    """Replaces `{"epochs": ..., "values": ...}` among the options by the schedule that it describes."""

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return piecewise(epochs=value["epochs"], values=value["values"], steps=steps, where=f"{where}.{name}")

    return {name: one(name, value) for name, value in options.items()}
