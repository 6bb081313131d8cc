"""What surrounds a preconditioner of tensors: leaves to groups, bad gradients, counts, and back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._layout import varying_as
from kfac_optax._tree import named_leaves
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import check_legal, start_checked
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import Group, Rules, make_groups


class Start(NamedTuple):
    """What a state begins with."""

    groups: tuple[Group, ...]
    dtype: Any  # float32 or wider
    params: PyTree  # not empty


class Step(NamedTuple):
    """What the parts of one update share."""

    where: str
    groups: tuple[Group, ...]
    dtype: Any
    tensors: dict[str, jax.Array]  # the gradient by group, zero where it is not finite
    finite: jax.Array  # whether it is
    count: jax.Array  # gradients accepted before this one
    now: dict[str, Any]  # hyperparameters by name
    updates: PyTree  # the gradient as it came
    params: PyTree | None
    extra: dict[str, Any]  # the extra arguments of `update`

    def value(self, name: str) -> jax.Array:
        """A hyperparameter in the dtype of the state."""
        return jnp.asarray(self.now[name], self.dtype)


class Advanced(NamedTuple):
    """What a preconditioner makes of one step."""

    tensors: dict[str, jax.Array]  # its update by group
    parts: tuple  # of the new state, between counts and hyperparameters
    good: jax.Array  # whether gradient, update and what depends on it are finite
    skipped: Any = 0  # statistics of a finite gradient that were not finite
    failed: Any = 0  # factorisations that were not finite


class Axiswise(NamedTuple):
    """A preconditioner that sees leaves as groups of equal tensors.

    Attributes:
      where: its name, for errors.
      rules: what becomes of the axes of a leaf.
      hyper: numbers and schedules by name, checked.
      state: its state, a named tuple with `counts` first and `given` last.
      groups_in: the field of the state that has something of every group.
      start: `Start -> parts` of the state.
      advance: `(Step, state) -> Advanced`.
    """

    where: str
    rules: Rules
    hyper: dict[str, ScalarOrSchedule]
    state: Any
    groups_in: str
    start: Callable[[Start], tuple]
    advance: Callable[[Step, Any], Advanced]


def transformation(method: Axiswise) -> optax.GradientTransformationExtraArgs:
    """The preconditioner as a transformation of Optax.

    A gradient that is not finite gives an update of zeros. Leaves without entries pass on.

    Raises:
      TypeError: a hyperparameter is no number and no schedule.
      ValueError: a hyperparameter is out of range.
    """
    for name, value in method.hyper.items():
        check_legal(method.where, name, value)

    def init(params: PyTree) -> Any:
        given = start_checked(**method.hyper)
        leaves = named_leaves(params)
        if not leaves:  # placeholders are one non-parameter each to optax.tree.map_params
            parts = gate.placeholders()[: len(method.state._fields) - 2]
            return method.state(gate.no_counts(), *parts, given)
        groups = make_groups(method.where, leaves, method.rules)
        parts = method.start(Start(groups, gate.state_dtype(leaves), params))
        return varying_as(method.state(gate.no_counts(), *parts, given), params)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        leaves = named_leaves(updates)
        if not leaves:
            return updates, state
        # each device goes its own way where gradients do, those at drawn labels among them; what
        # others are given in a chain, the curvature of a part of the batch say, is not read
        state = varying_as(state, (updates, extra.get("sampled_grads")))
        groups = make_groups(method.where, leaves, method.rules)
        held = getattr(state, method.groups_in)
        gate.check_groups(method.where, groups, held)
        dtype = gate.dtype_of(held)
        tensors, finite = gate.cleaned_tensors(groups, leaves, dtype)
        count = state.counts.gradient_count
        now, given = gate.checked_all(state.given, count, **method.hyper)
        step = Step(
            method.where, groups, dtype, tensors, finite, count, now, updates, params, extra
        )
        made = method.advance(step, state)
        out, good = gate.passed_on(updates, groups, made.tensors, made.good)
        counts = gate.counted(state.counts, finite, good, made.skipped, made.failed)
        return out, method.state(counts, *made.parts, given)

    return optax.GradientTransformationExtraArgs(init, update)
