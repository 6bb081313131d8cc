"""Numbers that are the same in every step: a schedule of one is refused in words when a
transformation is made.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._types import ScalarOrSchedule
from tests import helpers as h

PROBLEM = h.plain_problem()
# what functions cannot do without, and for which this test has no choice
REQUIRED = {
    "batches": [(PROBLEM.x,)],
    "block": ko.kronecker(),
    "damping": 0.1,
    "estimator": PROBLEM.estimator,
    "key": jax.random.key(0),
    "layers": PROBLEM.layers,
    "learning_rate": 0.1,
    "opt_state": ko.noisy_kfac(PROBLEM.layers, learning_rate=0.1).init(PROBLEM.params),
    "optimizer": ko.quadratic_step(),
    "params": PROBLEM.params,
    "preconditioner": optax.identity(),
    "product": lambda v: v,
    "rank": 2,
    "rows": jnp.eye(2)[None],
    "scale": 1.0,
    "shape": (2, 3),
    "size": 8,
    "weight_decay": 0.1,
}
# words that make other functions need the number
BESIDE = {("adapt_damping", "search_decay"): {"search_every": 10}}
# under what name the transformation that a preset hands it on to refuses it
KNOWN_AS = {"least_decrease": "threshold", "damping_decay": "decay", "decrease_decay": "decay"}


UNIONS = (types.UnionType, typing.Union)


def _kinds(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """The types of which an annotation is a union, or itself."""
    of = parameter.annotation
    return typing.get_args(of) if typing.get_origin(of) in UNIONS else (of,)


def _takes_a_schedule(parameter: inspect.Parameter) -> bool:
    # the members of the type, among others such as None
    return set(typing.get_args(ScalarOrSchedule)) <= set(_kinds(parameter))


def _takes_a_number(parameter: inspect.Parameter) -> bool:
    """Annotated as a number and neither schedule nor function, or with a float as default."""
    kinds = _kinds(parameter)
    # bare, or of arguments
    functions = [kind for kind in kinds if Callable in (kind, typing.get_origin(kind))]
    if functions:
        return False
    return float in kinds or (Any in kinds and isinstance(parameter.default, float))


def _words_that(fits: Callable[[inspect.Parameter], bool]) -> list[tuple[str, str]]:
    """Pairs of a public function and a word of it."""
    found = []
    for name, function in inspect.getmembers(ko, inspect.isfunction):
        for parameter in inspect.signature(function).parameters.values():
            if fits(parameter):
                found.append((name, parameter.name))
    return found


NUMBERS = _words_that(_takes_a_number)
SCHEDULES = _words_that(_takes_a_schedule)
SEEDS = _words_that(lambda parameter: parameter.name == "seed")


def _made(name: str, word: str, **given: Any) -> Any:
    """What a function makes of all that it cannot do without, and some words."""
    parameters = inspect.signature(getattr(ko, name)).parameters.values()
    words = BESIDE.get((name, word), {})
    for p in parameters:
        # a rate is left out only where nothing bounds the step
        if p.name in REQUIRED and (p.default is p.empty or p.name == "learning_rate"):
            words = words | {p.name: REQUIRED[p.name]}
    words = words | given
    positional = [
        words.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in words
    ]
    return getattr(ko, name)(*positional, **words)


def _schedule(step: Any) -> float:
    return 0.5


def test_numbers_of_every_kind_are_found():
    # with a default and without, for presets and for what they are made of
    for known in (
        ("kfac", "momentum"),
        ("bound_step", "momentum"),
        ("adapt_damping", "search_decay"),
        ("coarse_correction", "fine_weight"),
        ("lissa", "scale"),
        ("laplace", "prior_precision"),
        ("tnt", "examples"),
    ):
        assert known in NUMBERS
    # not those that may be schedules, or functions of the arguments
    for known in (("kfac", "damping"), ("kfac", "learning_rate")):
        assert known in SCHEDULES
        assert known not in NUMBERS
    assert ("fisher", "subsample") not in NUMBERS


@pytest.mark.parametrize(("name", "word"), NUMBERS)
def test_a_schedule_of_a_number_is_refused_in_words(name, word):
    said = KNOWN_AS.get(word, word)
    message = rf"^\w+: {said} is <function _schedule .*>, a schedule; expected a number"
    with pytest.raises(TypeError, match=message):
        _made(name, word, **{word: _schedule})


@pytest.mark.parametrize(("name", "word"), SCHEDULES)
def test_a_schedule_is_taken_where_one_may_be(name, word):
    assert _made(name, word, **{word: _schedule}) is not None


@pytest.mark.parametrize(
    "seed", [_schedule, 0.5, True, jax.random.key(0)], ids=["function", "half", "flag", "key"]
)
@pytest.mark.parametrize("name", [name for name, word in SEEDS])
def test_a_seed_is_a_whole_number(name, seed):
    with pytest.raises(TypeError, match=r"(?s)^\w+: seed is .*; expected a (whole|Python) number"):
        _made(name, "seed", seed=seed)


@pytest.mark.parametrize("name", [name for name, word in SEEDS])
def test_of_any_kind_that_makes_a_key(name):
    for seed in (-1, np.int64(3)):
        assert _made(name, "seed", seed=seed) is not None


@pytest.mark.parametrize("make", [ko.bound_step, ko.bound_movement])
def test_of_a_bound_the_momentum_of_sgd_is_asked_for(make):
    with pytest.raises(TypeError, match=r"Pass the number that optax\.sgd has\.$"):
        make(optax.identity(), learning_rate=0.1, momentum=_schedule)


@pytest.mark.parametrize(
    "words", [dict(bound="damped"), dict(bound="exact"), dict(kl_clip=None, learning_rate=None)]
)
def test_momentum_is_a_number_whatever_the_bound(words):
    with pytest.raises(TypeError, match="momentum is <function _schedule .*>, a schedule"):
        _made("kfac", "momentum", momentum=_schedule, **words)


def test_a_number_may_be_injected_as_a_schedule():
    """`inject_hyperparams` makes an array of it in every step, which is no schedule any more."""
    tx = optax.inject_hyperparams(ko.bound_step, static_args=("preconditioner",))(
        optax.identity(), learning_rate=0.1, momentum=_schedule
    )
    state = jax.jit(tx.init)(PROBLEM.params)
    assert float(state.hyperparams["momentum"]) == 0.5


def test_what_is_no_number_at_all_says_what_may_be_one():
    with pytest.raises(
        TypeError, match=r"momentum is 'high'; expected a number or a jax\.Array\.$"
    ):
        ko.bound_step(optax.identity(), learning_rate=0.1, momentum="high")
