"""Hyperparameters that change with the epoch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import kfac_optax as ko

Schedule = Callable[[Any], Any]


def piecewise(
    *, epochs: Sequence[int], values: Sequence[float], steps: int, where: str = "piecewise"
) -> Schedule:
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
        raise ValueError(
            f"{where}: got {len(values)} values, expected {len(epochs) + 1}, one more than epochs"
        )
    if any(later <= earlier for earlier, later in zip((0, *epochs), epochs, strict=False)):
        raise ValueError(
            f"{where}: got epochs {tuple(epochs)}, expected increasing positive numbers"
        )
    starts = [epoch * steps for epoch in epochs]

    def schedule(step: Any) -> Any:
        if isinstance(step, int):  # on the host, nothing has to wait for a device
            return np.float32(values[sum(step >= start for start in starts)])
        stage = jnp.sum(jnp.asarray(step) >= jnp.asarray(starts, jnp.int32))
        return jnp.asarray(values, jnp.float32)[stage]

    return schedule


def rate_factor(section: Mapping[str, Any] | None, *, steps: int) -> Schedule | None:
    """What `config.schedule` multiplies the learning rate with, or None where it never changes."""
    if not section:
        return None
    return piecewise(
        epochs=section["epochs"], values=section["factors"], steps=steps, where="config.schedule"
    )


def resolve(options: Mapping[str, Any], *, steps: int, where: str) -> dict[str, Any]:
    """Replaces schedules among the options, `{"epochs": ..., "values": ...}` or the arguments of
    `refresh_period`.
    """

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "warmup_steps" in value:
            return ko.refresh_period(
                value["regular"], warmup_steps=value["warmup_steps"], first=value.get("first", 1)
            )
        return piecewise(
            epochs=value["epochs"], values=value["values"], steps=steps, where=f"{where}.{name}"
        )

    return {name: one(name, value) for name, value in options.items()}
