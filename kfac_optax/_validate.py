"""User-facing checks and messages. Each says where, what was got, what was expected, what to do."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from kfac_optax._types import Numeric, ScalarOrSchedule

NO_CURVATURE = """{where}.update got no `curvature`. Pass the lazy curvature of this batch,

    updates, opt_state = tx.update(grads, opt_state, params, curvature=fisher.at(params, batch["x"], key=key))

or `curvature=None` to take no statistics in this step. Wrappers that cannot forward extra arguments (such as
`TrainState.apply_gradients`) need the short recipe in the README."""


def _concrete(value: Any) -> bool:
    return isinstance(value, (int, float, np.ndarray, np.generic)) and not isinstance(value, bool)


def check_number(
    where: str,
    name: str,
    value: ScalarOrSchedule | None,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """Checks a hyperparameter that is a plain number; traced values and schedules are taken as they are."""
    if callable(value) or isinstance(value, jax.Array):
        return
    if not _concrete(value):
        raise TypeError(f"{where}: {name} is {value!r}; expected a number, a jax.Array or a schedule (step -> number).")
    wanted = []
    number = float(value)  # type: ignore[arg-type]
    if above is not None and not number > above:
        wanted.append(f"> {above:g}")
    if at_least is not None and not number >= at_least:
        wanted.append(f">= {at_least:g}")
    if at_most is not None and not number <= at_most:
        wanted.append(f"<= {at_most:g}")
    if wanted:
        raise ValueError(f"{where}: {name}={value!r}; expected {name} {' and '.join(wanted)}.")


def check_choice(where: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Checks a word against the legal ones."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{where}: {name}={value!r}; expected one of {', '.join(map(repr, choices))}.")


def resolve(value: ScalarOrSchedule, count: jax.Array) -> Numeric:
    """Value of a number or schedule at a step."""
    return value(count) if callable(value) else value
