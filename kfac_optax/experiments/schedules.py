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


def warmup_cosine(*, warmup: float, final: float, total: int, where: str) -> Schedule:
    """Rises linearly to 1, then falls to `final` along half a period of a cosine.

        min((t + 1) / w, 1) (final + (1 - final) (1 + cos(pi (t - w)_+ / (T - w))) / 2)

    Args:
        warmup: share of the run that the rise takes, `w = warmup T` steps, at least one.
        final: what is left at the end.
        total: steps `T` of the run.
        where: named in errors.

    Returns:
        The value as a function of the step, counted from 0.

    Raises:
        ValueError: shares that are none.

    >>> factor = warmup_cosine(warmup=0.2, final=0.0, total=10, where="here")
    >>> print([round(float(factor(step)), 2) for step in (0, 1, 2, 6, 10)])
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if not 0 <= warmup < 1 or not 0 <= final <= 1:
        raise ValueError(
            f"{where}: got warmup={warmup} and final={final}, expected 0 <= warmup < 1 and "
            "0 <= final <= 1"
        )
    rise = max(round(warmup * total), 1)

    def schedule(step: Any) -> Any:
        done = jnp.clip((step - rise) / max(total - rise, 1), 0, 1)
        fall = final + (1 - final) * (1 + jnp.cos(jnp.pi * done)) / 2
        return jnp.minimum((step + 1) / rise, 1) * fall

    return schedule


def rate_factor(
    section: Mapping[str, Any] | None, *, steps: int, epochs: int = 0
) -> Schedule | None:
    """What `config.schedule` multiplies the learning rate with, or None where it never changes:
    `{"epochs": ..., "factors": ...}`, or `{"warmup": ..., "final": ...}` over all `epochs`.

    Raises:
        ValueError: other words.
    """
    if not section:
        return None
    where = "config.schedule"
    forms = ({"epochs", "factors"}, {"warmup", "final"})
    if set(section) not in forms:
        raise ValueError(
            f"{where}: got {', '.join(sorted(section))}; expected epochs and factors, or warmup and final"
        )
    if "warmup" in section:
        return warmup_cosine(**section, total=steps * epochs, where=where)
    return piecewise(epochs=section["epochs"], values=section["factors"], steps=steps, where=where)


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
