"""Damped natural gradient in sample space, with the momentum of SPRING, as a transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import named_leaves, replace_leaves, wide_dtype
from kfac_optax._types import PyTree
from kfac_optax._validate import (
    check_axis_name,
    check_legal,
    check_number,
    check_real,
    checked,
    start_checked,
)
from kfac_optax.engine.state import SampleSpaceState
from kfac_optax.methods.sample_space.solve import Rule, Solved, next_direction
from kfac_optax.step_rules._per_layer import within

_TOO_MUCH = 0.1  # share of the gradient that a solve may leave


def scale_by_samples(rule: Rule) -> optax.GradientTransformationExtraArgs:
    """`x = (F + damping I)^{-1} (g - momentum F phi)`, `phi <- momentum phi + x`."""
    _check(rule)
    # hyperparameters that an update checks
    hyper = {"damping": rule.damping}
    if rule.momentum is not None:
        hyper["momentum"] = rule.momentum

    def init(params: PyTree) -> SampleSpaceState:
        return _start(rule, params, hyper)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        curvature: Any = None,
        residual: PyTree = None,
        damping: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, SampleSpaceState]:
        del params, extra
        # optax.partition may leave a group empty
        if not jax.tree.leaves(updates):
            return updates, state
        leaves = named_leaves(updates)
        check_real(rule.where, leaves)
        # a damping given to `update` goes before that of the preset
        damping = rule.damping if damping is None else damping
        damping, given = checked(state.given, "damping", damping, state.sample_count)
        momentum = None
        if rule.momentum is not None:
            momentum, given = checked(given, "momentum", rule.momentum, state.sample_count)
        with jax.named_scope("kfac/sample_space"):
            new, solved = next_direction(
                rule, state.previous_update, leaves, curvature, residual, damping, momentum
            )
        # a step that cannot be used is zero, and phi stays
        zeroed = {n: jnp.where(solved.usable, x, 0) for n, x in new.items()}
        cast = {n: within(x, leaves[n].dtype) for n, x in zeroed.items()}
        state = state._replace(
            sample_count=optax.safe_increment(state.sample_count),
            skipped_steps=state.skipped_steps + (~solved.usable).astype(jnp.int32),
            inexact_solves=state.inexact_solves + _inexact(rule, solved).astype(jnp.int32),
            solve_error=jnp.where(solved.usable, solved.error, state.solve_error),
            given=given,
        )
        if momentum is not None:
            # phi keeps the precision of the solve
            old = named_leaves(state.previous_update)
            kept = {n: jnp.where(solved.usable, x, old[n]) for n, x in new.items()}
            state = state._replace(previous_update=replace_leaves(state.previous_update, kept))
        return replace_leaves(updates, cast), state

    return optax.GradientTransformationExtraArgs(init, update)


def _start(rule: Rule, params: PyTree, hyper: dict[str, Any]) -> SampleSpaceState:
    check_real(rule.where, named_leaves(params))
    # at least single precision
    wide = wide_dtype(params)
    previous = None
    if rule.momentum is not None:
        previous = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), params)
    count, skipped, inexact = (jnp.zeros((), jnp.int32) for _ in range(3))
    error = jnp.zeros((), jnp.float32)
    return SampleSpaceState(previous, count, skipped, inexact, error, start_checked(**hyper))


def _inexact(rule: Rule, solved: Solved) -> jax.Array:
    """A cutoff leaves a part of the gradient on purpose."""
    return solved.usable & (solved.error > _TOO_MUCH) & (rule.cutoff is None)


def _check(rule: Rule) -> None:
    check_legal(rule.where, "damping", rule.damping)
    if rule.momentum is not None:
        check_legal(rule.where, "momentum", rule.momentum)
    if rule.cutoff is not None:
        # relative to the largest eigenvalue of J J^T / N
        check_number(rule.where, "cutoff", rule.cutoff, above=0, at_most=1)
    check_axis_name(rule.where, rule.axis_name)
    check_number(rule.where, "chunk", rule.chunk, at_least=1)
    check_number(rule.where, "refine", rule.refine, at_least=0)
