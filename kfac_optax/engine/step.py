"""The state at the start, and one step of a preconditioner with curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import all_finite, named_leaves, replace_leaves
from kfac_optax._types import Coupling, Directions, Layers, PyTree, ScalarOrSchedule, Sloped
from kfac_optax._validate import Checked, checked, start_checked
from kfac_optax.engine.accumulate import average_at, take_statistics
from kfac_optax.engine.arguments import (
    check_curvature,
    factors_dtype,
    gradient_rows,
    own_layers,
)
from kfac_optax.engine.branches import due_at, parts_due
from kfac_optax.engine.choice import BlockOf
from kfac_optax.engine.grouping import Grouping, group_layers
from kfac_optax.engine.initial import initial
from kfac_optax.engine.memory import check_memory
from kfac_optax.engine.near import near_factors
from kfac_optax.engine.placed import inverses_of_all, owners_of
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.precondition import precondition
from kfac_optax.engine.protocol import check_block
from kfac_optax.engine.refresh import inverses_read, refresh_parts
from kfac_optax.engine.stagger import chosen
from kfac_optax.engine.state import CurvatureState, Step
from kfac_optax.engine.uncovered import graft_uncovered
from kfac_optax.estimators.plan import Plan


class Rule(NamedTuple):
    """The settings of a transformation, see `scale_by_curvature`."""

    where: str
    layers: Layers  # as covered
    block_of: BlockOf
    coupling: Coupling | None
    numbers: dict[str, ScalarOrSchedule]  # that are checked in every update
    parts: int  # of a staggered refresh
    factored_gradient: bool
    separate: bool
    sloped: bool
    axis_name: Any
    factor_dtype: Any
    placement: Placement | None
    memory: float | None = None  # bytes for factors and inverses on a device


def start_state(rule: Rule, params: PyTree) -> CurvatureState:
    """The state before anything was measured."""
    state = _nothing_counted(rule)
    # optax.tree.map_params asks with a placeholder: factors are one non-parameter
    if not jax.tree.leaves(params):
        return state
    leaves = named_leaves(params)
    mine = own_layers(rule.where, rule.layers, leaves)
    dtype = factors_dtype(leaves, mine, rule.factor_dtype)
    first, _ = checked(state.given, "damping", rule.numbers["damping"], state.kfac_count)
    start = jnp.asarray(first, dtype)
    grouping = group_layers(mine, rule.block_of)
    for bucket in grouping.buckets:
        check_block(rule.where, bucket, dtype)
    # one compiled call instead of an eager one per array
    make = jax.jit(lambda damping: initial(grouping, rule.coupling, damping, rule.placement))
    if rule.memory is not None:
        factors, inverses, _ = jax.eval_shape(make, start)
        where = f"{rule.where}.init"
        check_memory(where, rule.memory, rule.placement, grouping.buckets, factors, inverses)
    factors, inverses, coarse = make(start)
    return state._replace(
        damping=jnp.array(start, jnp.float32), factors=factors, inverses=inverses, coarse=coarse
    )


def _nothing_counted(rule: Rule) -> CurvatureState:
    """A state of counts alone."""

    def zero(dtype: Any = jnp.int32) -> jax.Array:
        # a new array each time: a buffer that occurs twice cannot be donated
        return jnp.zeros((), dtype)

    return CurvatureState(
        kfac_count=zero(),
        curvature_count=zero(),
        skipped_statistics=zero(),
        failed_inverses=zero(),
        # nothing refreshed yet: older than the first step
        inverse_age=jnp.ones((), jnp.int32),
        damping=zero(jnp.float32),
        coarse_share=zero(jnp.float32),
        factors=zero(),
        inverses=zero(),
        coarse=zero(),
        non_finite_updates=zero(),
        given=start_checked(**rule.numbers),
    )


def take_step(
    rule: Rule,
    updates: PyTree,
    state: CurvatureState,
    curvature: Any,
    measure: Any,
    refresh: Any,
    damping: ScalarOrSchedule | None,
) -> tuple[PyTree, CurvatureState]:
    """One step: statistics and inverses where they are due, then the preconditioned gradient."""
    leaves = named_leaves(updates)
    mine = own_layers(rule.where, rule.layers, leaves)
    dtype = factors_dtype(leaves, mine, rule.factor_dtype)
    now, given = _numbers_now(rule, state, damping)
    if rule.placement is not None:
        rule.placement.check_mapped()
    # the state's buckets and the plan's layers are of one grouping
    grouping = group_layers(mine, rule.block_of)
    step = Step(grouping, rule.coupling, jnp.asarray(now["damping"], dtype), rule.placement)
    plan = _plan(rule, grouping, dtype, state.kfac_count)
    held = state

    def statistics():
        # only here: a divided state has to be collected for it
        inverses = inverses_of_all(step, held.factors, held.inverses)
        wanted = plan._replace(inverses=inverses_read(grouping, inverses))
        if plan.travel.bits is not None:
            average = average_at(held.curvature_count + 1, now["decay"])
            wanted = wanted._replace(near=near_factors(step, held.factors, average))
        if step.owned is not None:
            # nothing is averaged here between the devices that share out the layers; where
            # statistics are scattered the batch is that of all of them
            if step.owned.local:
                over = step.owned.averaged_over(rule.axis_name)
                owners = owners_of(step, step.owned, held.factors)
                wanted = wanted._replace(axis_name=over, owners=owners)
            else:
                wanted = wanted._replace(apart=step.owned.names)
        return curvature.statistics(wanted)

    # statistics first: a refresh in the same step sees them
    if curvature is not None and measure is not False:
        check_curvature(rule.where, curvature)
        due: Any = True
        if not measure and refresh is None:
            due = due_at(state.kfac_count, now["curvature_every"])
        state = take_statistics(step, state, due, statistics, now["decay"])
    if refresh is None:
        parts_now: Any = parts_due(state, now["inverse_every"], rule.parts)
    else:
        parts_now = chosen(f"{rule.where}.update", refresh, rule.parts)
    state = refresh_parts(step, state, parts_now)
    updates, share, finite = _preconditioned(rule, step, state, plan, updates, leaves, curvature)
    return updates, _counted(step, state, share, finite)._replace(given=given)


def _numbers_now(
    rule: Rule, state: CurvatureState, damping: ScalarOrSchedule | None
) -> tuple[dict[str, Any], dict[str, Checked]]:
    """The numbers at this step by name, and what is remembered of them."""
    wanted = dict(rule.numbers)
    if damping is not None:
        wanted["damping"] = damping
    # all of them in every step: what is remembered does not depend on who decides about the
    # schedule
    now: dict[str, Any] = {}
    given = state.given
    for name, value in wanted.items():
        now[name], given = checked(given, name, value, state.kfac_count)
    return now, given


def _plan(rule: Rule, grouping: Grouping, dtype: Any, count: Any) -> Plan:
    """What the curvature is asked for."""
    layers, blocks, _ = grouping
    plan = Plan(layers, blocks, rule.coupling, dtype, rule.axis_name, count)
    return plan if rule.placement is None else plan._replace(travel=rule.placement.travel)


def _preconditioned(
    rule: Rule,
    step: Step,
    state: CurvatureState,
    plan: Plan,
    updates: PyTree,
    leaves: dict[str, jax.Array],
    curvature: Any,
) -> tuple[PyTree, jax.Array, jax.Array]:
    """The update, the share that the coupling has in it, and whether all of it is finite."""
    # (a, g) of layers whose gradient is sum_n a_n g_n^T
    rows = gradient_rows(rule.where, curvature, plan) if rule.factored_gradient else None
    covered: set[str] = set()
    for layer in step.layers:
        covered.update(layer.leaves)
    finite = all_finite({name: x for name, x in leaves.items() if name not in covered})
    new = precondition(
        step,
        state,
        leaves,
        plan.dtype,
        curvature,
        rule.axis_name,
        rows,
        finite,
        rule.separate,
        rule.sloped,
    )
    # what no block covers is left out as well where any part of the update is not finite
    left = {name: jnp.where(new.finite, x, 0) for name, x in leaves.items() if name not in covered}
    updates = replace_leaves(updates, left)
    joined = _joined(updates, new.parts, rule.separate, rule.layers)
    if new.slopes is not None:
        joined = Sloped(joined, new.slopes.values, new.slopes.exponent)
    return joined, new.share, new.finite


def _counted(
    step: Step, state: CurvatureState, share: jax.Array, finite: jax.Array
) -> CurvatureState:
    """The state behind a step."""
    known = jnp.isfinite(share)
    return state._replace(
        kfac_count=optax.safe_increment(state.kfac_count),
        inverse_age=optax.safe_increment(state.inverse_age),
        damping=step.damping.astype(jnp.float32),
        coarse_share=jnp.where(known, share.astype(jnp.float32), state.coarse_share),
        non_finite_updates=state.non_finite_updates + (~finite).astype(jnp.int32),
    )


def _joined(
    updates: PyTree, parts: list[dict[str, jax.Array]], separate: bool, layers: Layers
) -> PyTree:
    """The parts as trees like the gradient, one by one, or the only one as it is."""
    first = graft_uncovered(replace_leaves(updates, parts[0]), layers)
    if not separate:
        return first
    zeros = jax.tree.map(jnp.zeros_like, updates)
    return Directions((first, *(replace_leaves(zeros, part) for part in parts[1:])))
