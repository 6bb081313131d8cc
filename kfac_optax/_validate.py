"""User-facing checks and messages. Each says where, what was got, what was expected, what to do."""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import Numeric, ScalarOrSchedule

NO_CURVATURE = """{where}.update got no `curvature`. Pass the lazy curvature of this batch,

    updates, opt_state = tx.update(grads, opt_state, params, curvature=fisher.at(params, batch["x"], key=key))

or `curvature=None` to take no statistics in this step. Wrappers that cannot forward extra arguments
(such as `TrainState.apply_gradients`) need the short recipe of docs/howto/loops.md."""


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
    """Checks a hyperparameter that is a plain number; traced values and schedules are taken as they
    are.
    """
    # known only in an update, where `checked` looks at it
    if callable(value) or isinstance(value, jax.Array):
        return
    if not _concrete(value):
        raise TypeError(
            f"{where}: {name} is {value!r}; expected a number, a jax.Array or a schedule (step -> "
            "number)."
        )
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


class Checked(NamedTuple):
    """What is remembered of a hyperparameter whose value is known only in an update."""

    last_good: jax.Array  # shape=(), dtype=float32
    ignored_values: jax.Array  # shape=(), dtype=int32: how many made no sense, and were not used


def check_legal(where: str, name: str, value: ScalarOrSchedule | None) -> None:
    """Checks a hyperparameter against `LEGAL` where it is a plain number; `checked` does so for all
    others.
    """
    legal = LEGAL[name]
    # of schedules and traced numbers `checked` holds the same bounds
    check_number(
        where, name, value, above=legal.above, at_least=legal.at_least, at_most=legal.at_most
    )


def start_checked(**values: ScalarOrSchedule | None) -> dict[str, Checked]:
    """The part of a state that `checked` needs, by name behind `given_`; nothing is counted yet.

    >>> print(start_checked(damping=0.5)["given_damping"].last_good, start_checked(damping=-1.0)["given_damping"].last_good)
    0.5 0.001
    """
    memory: dict[str, Checked] = {}
    for name, value in values.items():
        # in use until it has been legal once
        good = jnp.full((), LEGAL[name].default, jnp.float32)
        if value is not None:
            now = jnp.asarray(resolve(value, jnp.zeros((), jnp.int32)), jnp.float32)
            good = jnp.where(_is_legal(name, now), now, good)
        # a new array: that of the caller is not given away with the state
        memory[f"given_{name}"] = Checked(jnp.array(good), jnp.zeros((), jnp.int32))
    return memory


def checked(
    memory: dict[str, Checked], name: str, value: ScalarOrSchedule, count: jax.Array
) -> tuple[Numeric, dict[str, Checked]]:
    """The value of a hyperparameter at a step, or the last good one where it is out of range or not
    a number.

    Plain numbers were checked when the transformation was made, and stay as they are.

    >>> memory = start_checked(damping=0.5)
    >>> value, memory = checked(memory, "damping", jnp.float32(jnp.nan), jnp.int32(0))
    >>> print(value, memory["given_damping"].ignored_values)
    0.5 1
    """
    key = f"given_{name}"
    before = memory[key]
    # a plain number was checked at construction
    if _concrete(value):
        return value, memory  # type: ignore[return-value]
    value = jnp.asarray(resolve(value, count))
    good = _is_legal(name, value)
    # what is out of range changes neither the value in use nor what is remembered
    used = jnp.where(good, value, before.last_good.astype(value.dtype))
    last = jnp.where(good, value.astype(jnp.float32), before.last_good)
    after = Checked(last, before.ignored_values + (~good).astype(jnp.int32))
    return used, memory | {key: after}


def _is_legal(name: str, value: jax.Array) -> jax.Array:
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


def check_choice(where: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Checks a word against the legal ones."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"{where}: {name}={value!r}; expected one of {', '.join(map(repr, choices))}."
        )


def check_real(where: str, leaves: Mapping[str, Any]) -> None:
    """Raises where a leaf has no real floating dtype.

    Raises:
      TypeError: names the leaf.
    """
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{where}: leaf {name!r} has dtype {leaf.dtype}; expected real floating numbers. "
                "Take it out with optax.masked or optax.partition, or split a complex parameter "
                "into real and imaginary part (optax.contrib.split_real_and_imaginary)."
            )


def check_unused(where: str, beside: str, **words: tuple[Any, Any]) -> None:
    """Refuses words that would have no effect.

    Args:
      where: for the error.
      beside: what makes them void, and where they belong.
      **words: `(value, default)` of each.

    Raises:
      ValueError: a word is not its default.

    >>> check_unused("kfac", "block=", sharing=("reduce", "expand"))
    Traceback (most recent call last):
    ValueError: kfac: got sharing='reduce', which has no effect beside block=; expected 'expand', the default.
    """
    for name, (value, default) in words.items():
        # identity first: an array does not compare to one truth value
        if value is not default and value != default:
            raise ValueError(
                f"{where}: got {name}={value!r}, which has no effect beside {beside}; "
                f"expected {default!r}, the default."
            )


def check_subsample(where: str, name: str, value: Any) -> None:
    """Checks a part of the batch: a fraction, a whole number of examples, or a function.

    Args:
      where: for the error.
      name: of the argument.
      value: `None` (all of it), a fraction in (0, 1], a whole number above one, or a function of
        the arguments.

    Raises:
      ValueError: neither; a one that may mean one example or all of them.

    >>> check_subsample("fisher", "subsample", 256)
    >>> check_subsample("fisher", "subsample", 1)
    Traceback (most recent call last):
    ValueError: fisher: subsample=1; expected a fraction in (0, 1], or a number of examples, at least 2.
    """
    if value is None or callable(value):
        return
    if isinstance(value, numbers.Integral):
        # True is an integer too, but no number of examples
        if not isinstance(value, bool) and int(value) >= 2:
            return
    elif isinstance(value, numbers.Real) and 0 < float(value) <= 1:
        return
    raise ValueError(
        f"{where}: {name}={value!r}; expected a fraction in (0, 1], or a number of examples, at "
        "least 2."
    )


def resolve(value: ScalarOrSchedule, count: jax.Array) -> Numeric:
    """Value of a number or schedule at a step."""
    return value(count) if callable(value) else value
