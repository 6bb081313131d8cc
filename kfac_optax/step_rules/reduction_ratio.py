"""How far the quadratic model of a step is to be believed: what it promised, and what came of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import inner
from kfac_optax._types import PyTree
from kfac_optax._validate import check_axis_name, check_number
from kfac_optax.step_rules.quadratic_model import QuadraticState

_SLACK = 1e-2  # a model that is right may promise the whole objective, up to rounding
_FLAT = 1e-2  # curvature below this share of the damping has no say in a step
_LEAST, _SMALL_BATCH = 1e-2, 128  # least damping of a batch of so many cases or fewer


class DampingRule(NamedTuple):
    """The settings of one `adapt_damping`."""

    where: str
    every: int
    decay: Any
    lower: Any
    upper: Any
    damping_min: Any
    damping_max: Any
    reject_below: Any
    include_damping: bool
    weight_decay: Any
    search_every: int | None
    search_decay: Any
    axis_name: Any


def check_rule(rule: DampingRule, initial_damping: Any) -> None:
    """Raises where a setting is out of range."""
    where = rule.where
    check_number(where, "initial_damping", initial_damping, above=0)
    check_number(where, "every", rule.every, at_least=1)
    check_number(where, "decay", rule.decay, above=0, at_most=1)
    check_number(where, "lower", rule.lower, at_least=0)
    check_number(where, "upper", rule.upper, at_least=rule.lower)
    least = _LEAST if rule.damping_min is None else rule.damping_min
    check_number(where, "damping_min", least, above=0)
    check_number(where, "damping_max", rule.damping_max, at_least=least)
    check_number(where, "weight_decay", rule.weight_decay, at_least=0)
    if rule.reject_below is not None:
        check_number(where, "reject_below", rule.reject_below)
    if rule.search_decay is not None:
        check_number(where, "search_decay", rule.search_decay, above=0)
    check_axis_name(where, rule.axis_name)
    if rule.search_every is not None:
        check_number(where, "search_every", rule.search_every, at_least=1)


def least_damping(rule: DampingRule, curvature: Any) -> Any:
    """The lower bound of the damping: as given, or by the cases of a batch.

    `0.01 min(1, 128 / cases)`: on the batch that a step is made for the ratio is close to one,
    whatever noise that batch has, and what is left of it falls with the number of cases.
    """
    if rule.damping_min is not None:
        return rule.damping_min
    if not hasattr(curvature, "cases"):
        return _LEAST
    cases = curvature.cases(axis_name=rule.axis_name)
    return _LEAST * min(1.0, _SMALL_BATCH / max(cases, 1))


def mean_over(x: Any, axis_name: Any) -> jax.Array:
    """The mean over devices, where there are several."""
    if axis_name is None:
        return jnp.asarray(x)
    return jax.lax.pmean(x, axis_name)


def quadratic_state(tree: PyTree) -> QuadraticState | None:
    """The first state of a `quadratic_step` in a tree of states."""

    def is_state(x: Any) -> bool:
        return isinstance(x, QuadraticState)

    leaves = jax.tree.leaves(tree, is_leaf=is_state)
    return next(filter(is_state, leaves), None)


def failures(state: QuadraticState | None) -> jax.Array:
    """How many steps had no quadratic model that could be minimised."""
    if state is None:
        return jnp.zeros((), jnp.int32)
    return state.non_finite_models + state.negative_curvatures


def model_change_of(
    rule: DampingRule,
    known: QuadraticState | None,
    step: PyTree,
    curvature: Any,
    grad: PyTree,
    lam: jax.Array,
) -> jax.Array:
    """`M(step) - M(0)`, from the state of `quadratic_step` or else from one more product."""
    if known is not None:
        return known.damped_change if rule.include_damping else known.model_change
    # grad^T delta + delta^T (F + shift I) delta / 2
    form = curvature.quadratic_form((step,), axis_name=rule.axis_name)
    form = form[0, 0].astype(lam.dtype)
    shift = rule.weight_decay + (lam if rule.include_damping else 0)
    slope = inner(grad, step).astype(lam.dtype)
    square = inner(step, step).astype(lam.dtype)
    return slope + (form + shift * square) / 2


class Promise(NamedTuple):
    """What is doubtful about a step, before the objective is asked."""

    too_much: jax.Array  # bool: a decrease beyond the objective itself, or one that is not finite
    flat: jax.Array  # bool: the step is as long as the damping lets it be, curvature has no say


def promise(
    rule: DampingRule,
    known: QuadraticState | None,
    step: PyTree,
    grad: PyTree,
    value: jax.Array,
) -> Promise:
    """Costs an inner product; without `quadratic_step` there is no model before the ratio is
    measured.
    """
    if known is None:
        return Promise(jnp.bool_(False), jnp.bool_(False))
    # M(delta) - M(0) = slope + curvature / 2, and the damped change has damping |delta|^2 / 2 more
    dtype = known.model_change.dtype
    slope = mean_over(inner(step, grad), rule.axis_name).astype(dtype)
    moves = known.damped_change != 0
    limit = jnp.abs(value).astype(dtype) * (1 + _SLACK)
    # negated, so that NaN counts
    too_much = moves & ~(-known.model_change <= limit)
    curvature = known.model_change - slope
    damping = known.damped_change - known.model_change
    flat = moves & ~(curvature > _FLAT * damping)
    return Promise(too_much, flat)


def lowest_ratio(rule: DampingRule, promised: Promise) -> jax.Array:
    """Ratios below this one reject the step."""
    # a step that promised too much has to keep more of its promise
    usual = -jnp.inf if rule.reject_below is None else rule.reject_below
    strict = jnp.maximum(usual, rule.lower)
    return jnp.where(promised.too_much, strict, usual)
