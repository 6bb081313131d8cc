"""Presets that share their words: one flat signature each, whatever they hand on to."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import jax

from kfac_optax.methods.given import unknown_numbers, with_checked

Preset = TypeVar("Preset", bound=Callable[..., Any])

# Numbers that decide on shapes: they cannot be known only when a step runs.
STATIC = (
    "rank",
    "memory",
    "correct_share",
    "oversampling",
    "power_iterations",
    "seed",
    "stagger",
    "positions",
    "max_dim",
    "merge",
    "size",
    "rows",
    "root",
    "chunk",
    "refine",
    "model_subsample",
    "window",
    "block",
)


class Default(NamedTuple):
    """The default of a static number in a signature.

    `optax.inject_hyperparams` makes an array of every default that is a number; this is none.
    """

    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def flat_signature(
    *sources: Callable[..., Any],
    without: Iterable[str] = (),
    schedules: tuple[str, ...] = (),
) -> Callable[[Preset], Preset]:
    """Gives a function with `**options` the keywords of those that the options go to, one by one.

    `inspect.signature`, and with it `optax.inject_hyperparams`, then sees every word with its
    default.

    Args:
      sources: functions whose keywords the options may be; the first that has a word counts.
      without: words of theirs that the function decides on itself.
      schedules: words that may be schedules, and that nothing in the function checks.

    Returns:
      A decorator. What it returns raises `TypeError` for an unknown word, naming those there are,
      and for a static number that is an array. Numbers that are known only in an update, and that
      nothing else checks, are checked there: the last good one counts.

    >>> def inner(*, damping=1e-3, block=None): return damping
    >>> @flat_signature(inner, without=("block",))
    ... def outer(layers, *, rank=2, **options): return rank, inner(**options)
    >>> print(inspect.signature(outer), outer("layers", damping=0.5))
    (layers, *, rank=2, damping=0.001) (2, 0.5)
    >>> outer("layers", dampin=0.5)
    Traceback (most recent call last):
    TypeError: outer: got an unknown argument 'dampin'. Did you mean 'damping'? Expected some of layers, rank, damping.
    """

    def decorate(function: Preset) -> Preset:
        parameters = _parameters(function, sources, frozenset(without))

        @functools.wraps(function)
        def preset(*args: Any, **words: Any) -> Any:
            for word in words:
                _check_known(function.__name__, word, tuple(parameters))
            # a default that is printed as a number, but is none, was not given
            given = {k: v for k, v in words.items() if not isinstance(v, Default)}
            for word in given.keys() & frozenset(STATIC):
                _check_static(function.__name__, word, given[word])
            # known only when a step runs: arrays, and schedules where the preset has a rule for
            # them
            late = unknown_numbers(given, schedules)
            # made once all the same: what is wrong with the other words is said now
            tx = function(*args, **given)
            return with_checked(functools.partial(function, *args, **given), **late) if late else tx

        made = cast(Any, preset)
        # what help, editors and inject_hyperparams see
        made.__signature__ = inspect.Signature(list(parameters.values()))
        return made

    return decorate


def check_size(where: str, name: str, value: Any) -> None:
    """Checks a number that decides on shapes.

    Raises:
      TypeError: it is no Python integer.
      ValueError: it is below one.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"{where}: {name} is {value!r}; expected a Python int, as shapes depend on it. With "
            f'optax.inject_hyperparams name it in static_args=("{name}",).'
        )
    if value < 1:
        raise ValueError(f"{where}: {name}={value!r}; expected {name} >= 1.")


def _parameters(
    function: Callable[..., Any],
    sources: Iterable[Callable[..., Any]],
    without: frozenset[str],
) -> dict[str, inspect.Parameter]:
    """Those of the function, then those of the sources that it does not have."""
    of_all: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            of_all[name] = parameter
    for source in sources:
        for name, parameter in inspect.signature(source).parameters.items():
            # the function's own words go before those of its sources
            if parameter.kind is parameter.KEYWORD_ONLY and name not in without:
                of_all.setdefault(name, parameter)
    return {name: _not_a_number(parameter) for name, parameter in of_all.items()}


def _not_a_number(parameter: inspect.Parameter) -> inspect.Parameter:
    # inject_hyperparams makes an array of every number among the defaults
    number = isinstance(parameter.default, (int, float))
    if parameter.name not in STATIC or not number:
        return parameter
    return parameter.replace(default=Default(parameter.default))


def _check_known(where: str, word: str, known: tuple[str, ...]) -> None:
    if word in known:
        return
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise TypeError(
        f"{where}: got an unknown argument {word!r}. {hint}Expected some of {', '.join(known)}."
    )


def _check_static(where: str, word: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{where}: {word} is an array; expected a Python number, as it decides on shapes. "
            f"optax.inject_hyperparams makes an array of every number: name it in "
            f'static_args=("{word}",).'
        )
