"""User-facing checks and messages. Each says where, what was got, what was expected, what to do."""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._legal import LEGAL, is_legal
from kfac_optax._types import Numeric, ScalarOrSchedule

NO_CURVATURE = """{where}.update got no `curvature`. Pass the lazy curvature of this batch,

    updates, opt_state = tx.update(grads, opt_state, params, curvature=fisher.at(params, batch["x"], key=key))

or `curvature=None` to take no statistics in this step. Wrappers that cannot forward extra arguments
(such as `TrainState.apply_gradients`) need the short recipe of docs/howto/loops.md."""


class NoProductsError(ValueError):
    """A curvature that has statistics, but no exact products."""


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
    schedule: bool = False,
    remedy: str = "Pass a number.",
) -> None:
    """Checks the value of a number; arrays, which may be traced, are taken as they are.

    Args:
      where: for the error.
      name: of the number.
      value: what was given for it.
      above: exclusive lower bound, if any.
      at_least: lower bound, if any.
      at_most: upper bound, if any.
      schedule: whether it may be a schedule, which is taken as it is.
      remedy: what to do about a schedule where none may be.

    Raises:
      TypeError: neither a number nor an array; a schedule where none may be.
      ValueError: out of range.

    >>> check_number("jorge", "eps", lambda step: 1e-6)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: jorge: eps is <function ...>, a schedule; expected a number or a jax.Array, ...
    """
    # an array is known only in an update, where `checked` looks at it
    if isinstance(value, jax.Array) or (schedule and callable(value)):
        return
    if callable(value):
        raise TypeError(
            f"{where}: {name} is {value!r}, a schedule; expected a number or a jax.Array, the same "
            f"in every step. {remedy}"
        )
    if not _concrete(value):
        kinds = "a number, a jax.Array or a schedule (step -> number)"
        raise TypeError(
            f"{where}: {name} is {value!r}; expected "
            f"{kinds if schedule else 'a number or a jax.Array'}."
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


def check_momentum(where: str, momentum: Numeric) -> None:
    """Checks the momentum of the `optax.sgd` behind a bound, which has a factor `1 / (1 - m)`."""
    remedy = "Pass the number that optax.sgd has."
    check_number(where, "momentum", momentum, at_least=0, at_most=0.999, remedy=remedy)


def check_seed(where: str, seed: Any) -> None:
    """Checks what a key is made of.

    Raises:
      TypeError: no whole number.

    >>> check_seed("psgd_kron", 0.5)
    Traceback (most recent call last):
    TypeError: psgd_kron: seed is 0.5; expected a whole number, of which jax.random.key makes a key.
    """
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        return
    raise TypeError(
        f"{where}: seed is {seed!r}; expected a whole number, of which jax.random.key makes a key."
    )


class Checked(NamedTuple):
    """What is remembered of a hyperparameter whose value is known only in an update."""

    last_good: jax.Array  # shape=(), dtype=float32
    ignored_values: jax.Array  # shape=(), dtype=int32: how many made no sense, and were not used


def check_legal(
    where: str,
    name: str,
    value: ScalarOrSchedule | None,
    *,
    schedule: bool = True,
) -> None:
    """Checks a hyperparameter against `LEGAL` where it is a plain number; `checked` does so for all
    others. With `schedule=False` it may be no schedule.
    """
    legal = LEGAL[name]
    # of schedules and traced numbers `checked` holds the same bounds
    check_number(
        where,
        name,
        value,
        above=legal.above,
        at_least=legal.at_least,
        at_most=legal.at_most,
        schedule=schedule,
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
            good = jnp.where(is_legal(name, now), now, good)
        # a new array: that of the caller is not given away with the state
        memory[f"given_{name}"] = Checked(jnp.array(good), jnp.zeros((), jnp.int32))
    return memory


def checked(
    memory: dict[str, Checked],
    name: str,
    value: ScalarOrSchedule,
    count: jax.Array,
) -> tuple[Numeric, dict[str, Checked]]:
    """The value of a hyperparameter at a step, or the last good one where it is out of range or not
    a number.

    Plain numbers stay as they are.

    Raises:
      ValueError: a plain number is out of range; it was given to `update`, since those of a
        transformation are checked when it is made.

    >>> memory = start_checked(damping=0.5)
    >>> value, memory = checked(memory, "damping", jnp.float32(jnp.nan), jnp.int32(0))
    >>> print(value, memory["given_damping"].ignored_values)
    0.5 1
    """
    key = f"given_{name}"
    before = memory[key]
    if _concrete(value):
        check_legal("update", name, value)
        return value, memory  # type: ignore[return-value]
    value = jnp.asarray(resolve(value, count))
    good = is_legal(name, value)
    # what is out of range changes neither the value in use nor what is remembered
    used = jnp.where(good, value, before.last_good.astype(value.dtype))
    last = jnp.where(good, value.astype(jnp.float32), before.last_good)
    after = Checked(last, before.ignored_values + (~good).astype(jnp.int32))
    return used, memory | {key: after}


def legal_or_nan(
    name: str,
    value: ScalarOrSchedule,
    count: jax.Array,
) -> Numeric:
    """The value of a hyperparameter at a step, NaN where it is out of range: for transformations
    that leave out and count a step whose numbers are not finite. Plain numbers were checked before.

    >>> print(legal_or_nan("momentum", lambda count: 0.5 + count, jnp.int32(1)))
    nan
    """
    value = jnp.asarray(resolve(value, count))
    return jnp.where(is_legal(name, value), value, jnp.nan)


def check_choice(
    where: str,
    name: str,
    value: Any,
    choices: Iterable[str],
) -> None:
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
    """Checks a part of the batch: a fraction, a whole number of examples, `"auto"`, or a function.

    Args:
      where: for the error.
      name: of the argument.
      value: `None` (all of it), a fraction in (0, 1], a whole number above one, `"auto"`, or a
        function of the arguments.

    Raises:
      ValueError: neither; a one that may mean one example or all of them.

    >>> check_subsample("fisher", "subsample", 256)
    >>> check_subsample("fisher", "subsample", 1)
    Traceback (most recent call last):
    ValueError: fisher: subsample=1; expected a fraction in (0, 1], a number of examples, at least 2, or 'auto'.
    """
    if value is None or callable(value) or (isinstance(value, str) and value == "auto"):
        return
    if isinstance(value, numbers.Integral):
        # True is an integer too, but no number of examples
        if not isinstance(value, bool) and int(value) >= 2:
            return
    elif isinstance(value, numbers.Real) and 0 < float(value) <= 1:
        return
    raise ValueError(
        f"{where}: {name}={value!r}; expected a fraction in (0, 1], a number of examples, at least "
        "2, or 'auto'."
    )


def check_axis_name(where: str, axis_name: Any) -> None:
    """Checks the name of a mapped axis, or several.

    Args:
      where: for the error.
      axis_name: `None`, a name, or a tuple or list of names.

    Raises:
      TypeError: anything else; JAX reads a number as an axis of an array, and would average over
        examples.

    >>> check_axis_name("kfac", ("data", "model"))
    >>> check_axis_name("kfac", 0)
    Traceback (most recent call last):
    TypeError: kfac: axis_name=0; expected the name of a mapped axis, a tuple of names, or None.
    """
    if axis_name is None or isinstance(axis_name, str):
        return
    several = isinstance(axis_name, (tuple, list)) and len(axis_name) > 0
    if several and all(isinstance(name, str) for name in axis_name):
        return
    raise TypeError(
        f"{where}: axis_name={axis_name!r}; expected the name of a mapped axis, a tuple of names, "
        "or None."
    )


def resolve(value: ScalarOrSchedule, count: jax.Array) -> Numeric:
    """Value of a number or schedule at a step."""
    return value(count) if callable(value) else value
