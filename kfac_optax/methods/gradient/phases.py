"""Statistics of every axis, what is made of them now and then, and the step: Shampoo's way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite, select
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked
from kfac_optax.engine.branches import due_at
from kfac_optax.engine.state import GradientCounts
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.roots import inverse_root_of_values
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import FULL, Group, Rules
from kfac_optax.methods.gradient.axis_products import statistic
from kfac_optax.methods.gradient.axiswise import Advanced, Axiswise, Start, Step, transformation
from kfac_optax.methods.gradient.momenta import Finish

Weights = tuple[jax.Array, jax.Array]  # of what is held and of what is new
ByAxis = dict[str, Any]


class AxiswiseState(NamedTuple):
    """State of the relatives of Shampoo. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    factors: Any  # statistics by group and axis
    inverses: Any  # what is made of them, by group and axis
    trace: Any  # momenta by group, or ()
    graft: PyTree  # state of the transformation that gives the norm, or ()
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def gradient_itself(step: Step) -> dict[str, jax.Array]:
    """Tensors by group: statistics are those of the gradient."""
    return step.tensors


def no_refresh(
    group: Group,
    step: Step,
    factors: ByAxis,
    inverses: ByAxis,
    previous: PyTree,
) -> tuple[ByAxis, PyTree]:
    """Nothing is kept between refreshes."""
    del group, step, factors
    return inverses, previous


class Phases(NamedTuple):
    """What tells the relatives apart, each a function of one group of equal tensors.

    Attributes:
      start: `(group, dtype) -> (factors, inverses)`, both by axis.
      take_in: `(group, tensors, factors, weights) -> factors` with those of a step in them.
      apply: `(group, step, factors, inverses, weights) -> tensors`, the gradient preconditioned.
      refresh: `(group, step, factors, inverses, previous) -> (inverses, last)`; its factorisations
        run after `previous`, the last result of the group before.
      observe: `step -> tensors` by group that statistics are taken of.
      in_turn: whether `take_in` factorises matrices: groups then come one after another.
      whiten: `(group, step, factors, inverses) -> matrices` by axis that `take_in` gets as a last
        argument; None where statistics of an axis know nothing of the other axes.
      level: `(factors, inverses) -> (factors, inverses)`, others of which the same is made, before
        a refresh; None where each is determined.
    """

    start: Callable[..., tuple[ByAxis, ByAxis]]
    take_in: Callable[..., ByAxis]
    apply: Callable[..., jax.Array]
    refresh: Callable[..., tuple[ByAxis, PyTree]] = no_refresh
    observe: Callable[[Step], dict[str, jax.Array]] = gradient_itself
    in_turn: bool = False
    whiten: Callable[..., ByAxis] | None = None
    level: Callable[[ByAxis, ByAxis], tuple[ByAxis, ByAxis]] | None = None


def by_phases(
    where: str,
    rules: Rules,
    hyper: dict[str, ScalarOrSchedule],
    phases: Phases,
    finish: Finish,
    *,
    state: Any = AxiswiseState,
    groups_in: str = "factors",
) -> optax.GradientTransformationExtraArgs:
    """Statistics first, then what is due of them, then the step, its norm and its momentum.

    Of the numbers in `hyper` these have a meaning here: `decay` (without it statistics are sums),
    `curvature_every`, the period of statistics, and `inverse_every`, that of `refresh`; without
    them both are 1.
    """
    method = where.removeprefix("scale_by_")

    def start(begin: Start) -> tuple:
        factors, inverses = {}, {}
        for group in begin.groups:
            factors[group.name], inverses[group.name] = phases.start(group, begin.dtype)
        return factors, inverses, *finish.start(begin)

    def advance(step: Step, held: Any) -> Advanced:
        weights = _weights(step)
        with jax.named_scope(f"{method}/statistics"):
            factors, skipped = _statistics(phases, step, held, weights)
        with jax.named_scope(f"{method}/roots"):
            factors, inverses = _levelled(phases, step, factors, held.inverses)
            inverses, failed = _refreshed(phases, step, factors, inverses)
        with jax.named_scope(f"{method}/precondition"):
            tensors = {}
            for group in step.groups:
                name = group.name
                own = factors[name], inverses[name]
                tensors[name] = phases.apply(group, step, *own, weights)
        tensors, trace, graft = finish.apply(step, tensors, held.trace, held.graft)
        # a momentum that is not finite would stay so for ever, and so would squares in the graft
        good = step.finite & all_finite((tensors, trace))
        good = good & gate.as_finite(graft, held.graft)
        trace = select(good, trace, held.trace)
        graft = select(good, graft, held.graft)
        new = factors, inverses, trace, graft
        return Advanced(tensors, new, good, skipped, failed)

    return transformation(Axiswise(where, rules, hyper, state, groups_in, start, advance))


def _due(step: Step, name: str) -> Any:
    """Whether something with a period is due; known at once where that is one."""
    every = step.now.get(name, 1)
    if isinstance(every, int) and every == 1:
        return True
    return due_at(step.count, every)


def _weights(step: Step) -> Weights:
    # which of the statistics accepted this is, if it is one
    number = step.count + 1
    if "curvature_every" in step.now:
        every = jnp.asarray(step.now["curvature_every"]).astype(jnp.int32)
        number = step.count // every + 1
    # without a decay statistics are sums
    decay = step.now.get("decay", 1.0)
    return gate.averaged(decay, number, step.dtype)


def _statistics(
    phases: Phases,
    step: Step,
    state: Any,
    weights: Weights,
) -> tuple[gate.Held, jax.Array]:
    """Factors with those of this step in them, and how many were not finite."""

    def measured(held: tuple[gate.Held, jax.Array]) -> tuple[gate.Held, jax.Array]:
        # within the branch: what is not due is not computed
        observed = phases.observe(step)
        old, _ = held
        new: gate.Held = {}
        previous: PyTree = ()
        for group in step.groups:
            name = group.name
            own = old[name]
            tensors = after(observed[name], previous)
            across = ()
            if phases.whiten is not None:
                across = (phases.whiten(group, step, own, state.inverses[name]),)
            new[name] = phases.take_in(group, tensors, own, weights, *across)
            if phases.in_turn:
                previous = new[name]
        return gate.accepted(new, old, step.finite)

    none = jnp.zeros((), jnp.int32)
    return gate.when_due(_due(step, "curvature_every"), measured, (state.factors, none))


def _levelled(
    phases: Phases,
    step: Step,
    factors: gate.Held,
    inverses: gate.Held,
) -> tuple[gate.Held, gate.Held]:
    """Factors and what was made of them, brought to one size in the steps that refresh."""
    if phases.level is None:
        return factors, inverses
    level = phases.level

    def change(held: tuple[gate.Held, gate.Held]) -> tuple[gate.Held, gate.Held]:
        old_factors, old_inverses = held
        new_factors, new_inverses = {}, {}
        for name, own in old_factors.items():
            pair = level(own, old_inverses[name])
            new_factors[name], new_inverses[name] = pair
        return new_factors, new_inverses

    due = step.finite & _due(step, "inverse_every")
    return gate.when_due(due, change, (factors, inverses))


def _refreshed(
    phases: Phases,
    step: Step,
    factors: gate.Held,
    inverses: gate.Held,
) -> tuple[gate.Held, jax.Array]:
    """What is made of factors, where it is due; what fails stays as it was and is counted."""
    if phases.refresh is no_refresh:
        return inverses, jnp.zeros((), jnp.int32)

    def refresh(held: tuple[gate.Held, jax.Array]) -> tuple[gate.Held, jax.Array]:
        old, _ = held
        made: gate.Held = {}
        previous: PyTree = ()  # batched factorisations run one after another
        for group in step.groups:
            own = factors[group.name], old[group.name]
            made[group.name], previous = phases.refresh(group, step, *own, previous)
        return gate.accepted(made, old, jnp.bool_(True))

    due = step.finite & _due(step, "inverse_every")
    return gate.when_due(due, refresh, (inverses, jnp.zeros((), jnp.int32)))


def averaged_in(
    group: Group,
    tensors: jax.Array,
    factors: ByAxis,
    weights: Weights,
) -> ByAxis:
    """Statistics of a group with those of a step in them, of all axes that have one."""
    held, new = weights
    out = {}
    for axis, old in factors.items():
        # H_i <- e H_i + (1 - e) mat_i(G) mat_i(G)^T
        product = statistic(tensors, int(axis), group.kinds[int(axis)])
        out[axis] = held * old + new * product
    return out


def zeros_by_axis(group: Group, dtype: Any) -> ByAxis:
    """A matrix of zeros for every axis, `[copies, n, n]`, or a diagonal `[copies, n]`."""
    made = {}
    for i, (n, kind) in enumerate(zip(group.block, group.kinds, strict=True)):
        shape = (n, n) if kind == FULL else (n,)
        made[str(i)] = jnp.zeros((group.copies, *shape), dtype)
    return made


def identities(group: Group, dtype: Any) -> ByAxis:
    """The identity for every axis that has a matrix."""
    made = {}
    for i in group.axes_of(FULL):
        identity = jnp.eye(group.block[i], dtype=dtype)
        made[str(i)] = jnp.tile(identity, (group.copies, 1, 1))
    return made


def diagonal_root(values: jax.Array, p: int, ridge: jax.Array) -> jax.Array:
    """Roots of diagonals, `[copies, n]`, which are never stale."""

    def root(diagonal: jax.Array) -> jax.Array:
        return inverse_root_of_values(diagonal, p, ridge=ridge)

    return jax.vmap(root)(values)
