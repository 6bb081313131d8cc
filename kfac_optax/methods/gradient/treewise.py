"""Methods that see all parameters at once: what goes in and out of their step.

A gradient that is not finite leaves everything as it was and gives an update of zero, and so does a
step that is not finite itself. What a method keeps is in float32 or wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._layout import varying_as
from kfac_optax._tree import named_leaves, select, wide_dtype
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, check_legal, check_real, start_checked
from kfac_optax.engine.state import GradientCounts
from kfac_optax.linalg.gram import replicated
from kfac_optax.methods.gradient import flat, gate
from kfac_optax.step_rules._per_layer import within


class TreeState(NamedTuple):
    """State of a method that sees all parameters at once."""

    counts: GradientCounts
    held: Any  # what the method keeps
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


class Step(NamedTuple):
    """What a step is given.

    Attributes:
      gradient: in the dtype of the state, a vector for a `flat` rule; all zero where it was not
        finite.
      finite: whether it was.
      held: what the method keeps.
      now: hyperparameters by name, in the dtype of the state.
      count: gradients used so far, without this one.
      params: as `update` got them.
      updates: the gradient as it came.
      extra: the extra arguments of `update`.
    """

    gradient: PyTree
    finite: jax.Array
    held: Any
    now: dict[str, jax.Array]
    count: jax.Array
    params: PyTree | None
    updates: PyTree
    extra: dict[str, Any]


class Made(NamedTuple):
    """What a step makes.

    Attributes:
      direction: like the gradient of the step.
      held: what the method keeps.
      usable: whether there is a direction; it is zero otherwise.
      skipped: statistics that were not finite, and have no part in what is held.
    """

    direction: PyTree
    held: Any
    usable: Any = True
    skipped: Any = 0


class Rule(NamedTuple):
    """A method.

    Attributes:
      where: its name, for errors.
      hyper: hyperparameters by name.
      start: `(params, dtype) -> held`.
      step: `Step -> Made`.
      guarded: whether what is held goes back to what it was where the step is not finite. A method
        with large arrays sees to that itself, without a copy of them.
      flat: whether gradient and direction are one vector `[d]` with the entries of all leaves.
    """

    where: str
    hyper: dict[str, ScalarOrSchedule]
    start: Callable[[PyTree, Any], Any]
    step: Callable[[Step], Made]
    guarded: bool = True
    flat: bool = False


def transformation(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The method as a transformation whose state is a `TreeState`.

    Raises:
      TypeError: a hyperparameter is no number and no schedule.
      ValueError: a hyperparameter is out of range.
    """
    for name, value in rule.hyper.items():
        check_legal(rule.where, name, value)

    def init(params: PyTree) -> TreeState:
        check_real(rule.where, named_leaves(params))
        held = rule.start(params, wide_dtype(params))
        state = TreeState(gate.no_counts(), held, start_checked(**rule.hyper))
        return varying_as(state, params)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        if not jax.tree.leaves(updates):
            return updates, state
        check_real(rule.where, named_leaves(updates))
        # each device goes its own way where gradients do; what others are given in a chain, the
        # curvature of a part of the batch say, is not read
        state = varying_as(state, updates)
        dtype, counts = wide_dtype(state.held), state.counts
        gradient = _taken(rule, updates, dtype)
        # a bad gradient is a zero one to the method
        finite = finite_as_one(gradient)
        gradient = jax.tree.map(lambda x: jnp.where(finite, x, 0), gradient)
        now, given = gate.checked_all(state.given, counts.gradient_count, **rule.hyper)
        now = {name: jnp.asarray(value, dtype) for name, value in now.items()}
        count = counts.gradient_count
        step = Step(gradient, finite, state.held, now, count, params, updates, extra)
        with jax.named_scope(rule.where):
            made = rule.step(step)
        good = finite & finite_as_one(made.direction)
        held = made.held
        if rule.guarded:
            good = good & finite_as_one(held)
        # asked once: what depends on them is computed after both
        good, shown = jax.lax.optimization_barrier((good, good & made.usable))
        if rule.guarded:
            held = select(good, held, state.held)

        direction = jax.tree.map(lambda x: jnp.where(shown, x, 0), made.direction)
        out = _given(rule, direction, updates, shown)
        counts = gate.counted(counts, finite, good, made.skipped, 0)
        return out, TreeState(counts, held, given)

    return optax.GradientTransformationExtraArgs(init, update)


def _taken(rule: Rule, updates: PyTree, dtype: Any) -> PyTree:
    """The gradient in the dtype of the state, as the rule has it."""
    if rule.flat:
        return flat.as_vector(updates, dtype)
    return jax.tree.map(lambda x: x.astype(dtype), updates)


def _given(
    rule: Rule,
    direction: PyTree,
    updates: PyTree,
    shown: jax.Array,
) -> PyTree:
    """A direction as a tree like the gradient, in its dtypes."""
    if rule.flat:
        return flat.as_leaves(direction, updates, shown)
    return jax.tree.map(lambda x, old: within(x, old.dtype), direction, updates)


def finite_as_one(tree: PyTree) -> jax.Array:
    """Whether all floating entries are finite, asked of one vector behind a barrier.

    A number that depends on all leaves of a deep net and changes each takes minutes to compile
    where XLA is free to compute it anew for every leaf.
    """
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    parts = [_in_one(x) for x in floats]
    together = jnp.concatenate(parts)
    finite = jnp.all(jnp.isfinite(together))
    return jax.lax.optimization_barrier(finite)


def _in_one(x: jax.Array) -> jax.Array:
    """The entries as a vector; one number in their place where they are on explicit mesh axes."""
    if replicated(x) is None:
        return x.ravel()
    finite = jnp.all(jnp.isfinite(x))
    stand_in = jnp.where(finite, 0, jnp.nan)
    return stand_in.astype(x.dtype)[None]


def zeros(tree: PyTree, dtype: Any) -> PyTree:
    """A tree of zeros in the dtype of the state, with arrays of its own, divided over devices as
    the tree is.
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype), tree)
